"""One file for each benchmark: its rows, its stop rule, and `grade`."""
