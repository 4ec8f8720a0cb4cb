"""Errors that the user can fix: one line that names the field, file or row, and what to do."""

from astra.errors import AstraError
from eval.errors import EvalError


class UserError(ValueError):
    """An error that the user can fix. The message names the field, file or row, and what to do."""


class DivergedError(UserError):
    """A loss or gradient that is not finite. The same settings lead to it at each start."""


class RankError(UserError):
    """An error of one rank that cannot reach the others."""


class RankZeroError(RuntimeError):
    """Raised on the other ranks when rank 0 met an error that it reports itself."""


def is_rank0_error(error: BaseException) -> bool:
    """Return whether every rank knows that rank 0 met this error, in `run_on_rank0`."""
    return isinstance(error, RankZeroError) or getattr(error, "of_rank0", False)


def read_first_line(error: Exception) -> str:
    """Return the first line of another library's error, or its type's name where it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


USER_ERRORS = (UserError, AstraError, EvalError)

# Subject of an error of astra or eval -> the recipe field or the option that sets it.
FIELDS = {
    "targets": "adapter.targets",
    "exclude": "adapter.exclude",
    "rank": "adapter.rank",
    "eigen_select": "adapter.eigen_select",
    "memory": "calibration.memory_gib",
    "adapter": "--adapter",
    "sharded": "--adapter",
    "model": "--model",
    "server": "--url",
    "served_model": "--url",
    "compare": "--compare",
}
# Subject -> what the user can do about it, in this program's own options.
HINTS = {
    "model": ", and use --backend openai",
    "served_model": "; check --model",
    "sharded": "; use --engine single",
    "sandbox": " with --allow-unsandboxed",
    "data": "; give a folder as data_dir",
}


def describe_error(error: Exception) -> str:
    """Return the text of `error`, between the field or option that its subject names and a hint."""
    subject = getattr(error, "subject", None)
    prefix = f"{FIELDS[subject]}: " if subject in FIELDS else ""
    return f"{prefix}{error}{HINTS.get(subject, '')}"
