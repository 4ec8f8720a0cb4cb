"""Read the final answer of a response (read), and compare it with the reference (compare)."""
