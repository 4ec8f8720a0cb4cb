"""What other harnesses say of the same model and responses. Needs requirements-crosscheck.txt."""
