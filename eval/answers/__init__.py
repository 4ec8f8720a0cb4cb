"""Read the final answer of a response (read), and compare it exactly with the reference (compare)."""
