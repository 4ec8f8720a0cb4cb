"""The same model, and the same responses, as other harnesses see them. Needs requirements-crosscheck.txt."""
