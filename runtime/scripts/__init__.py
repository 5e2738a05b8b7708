"""Scripts that were written for the Unsloth library: its names, in front of what this package does anyway."""
