"""Which part of a graph is which operator, and what is kept for backward."""
