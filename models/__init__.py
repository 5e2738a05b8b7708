"""What is in a checkpoint: shapes, loading, adapting, diagnosing, exporting."""
