"""Side-by-side comparisons of speed, memory and quality; each prints a table."""
