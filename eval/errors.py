"""What the evaluation raises for people."""


class EvalError(ValueError):
    """A benchmark that cannot be read or run; the message names the file and row, and what to do."""
