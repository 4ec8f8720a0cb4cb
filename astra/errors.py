"""The error that astra raises for a request it cannot serve, and its warning."""

from typing import Literal

Subject = Literal["targets", "exclude", "rank", "eigen_select", "memory", "adapter", "sharded"]
"""The setting that is at fault. The caller knows what its users call this setting."""


class AstraError(ValueError):
    """A request that the method cannot serve.

    The message is one line that names the module and what to do. It does not name the setting at
    fault: that is `subject`, and the caller puts its own name of the setting before the message.
    """

    def __init__(self, message: str, subject: Subject | None = None) -> None:
        super().__init__(message)
        self.subject = subject


class FallbackWarning(UserWarning):
    """A solver failed, and a slower one takes its place. The message names no module."""
