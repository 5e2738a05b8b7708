"""Side-by-side measurements of training systems."""
