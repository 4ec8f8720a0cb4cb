"""Helpers of the scripts in tests/distributed/workers, which run as ranks."""

import sys

from matplotlib.figure import Figure


def read_arguments() -> list[str]:
    """Return the command line's arguments without --local_rank, which deepspeed adds."""
    return [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]


def skip_plots() -> None:
    """Draw plots but do not write them, which takes half of a small run's time."""
    Figure.savefig = lambda *_, **__: None
