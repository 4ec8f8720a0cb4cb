"""The error that the evaluation raises for a request it cannot serve."""

from typing import Literal

Subject = Literal["model", "server", "served_model", "compare", "sandbox", "data"]
"""What an error is about. The caller knows what its users call it."""


class EvalError(ValueError):
    """A benchmark that cannot be read or run.

    The message is one line that names the file and row, the model or the server, and what to do. It
    does not name the setting at fault: `subject` does, and the caller puts its own name of that
    setting around the message.
    """

    def __init__(self, message: str, subject: Subject | None = None) -> None:
        super().__init__(message)
        self.subject = subject
