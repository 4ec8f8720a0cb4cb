"""One file for each benchmark: its rows, published prompt and stops, and `grade`, or the program of a response."""

from eval.tasks import commonsense, gsm8k, humaneval, math, mbpp
from eval.tasks.base import Suite

TASKS: dict[str, Suite] = {
    suite.name: suite
    for suite in (gsm8k.SUITE, *math.SUITES, humaneval.SUITE, *mbpp.SUITES, *commonsense.SUITES)
}
GROUPS = {"commonsense": tuple(commonsense.TASKS)}


def expand(names: list[str]) -> list[str]:
    """Suites by name, groups by what is in them, each once."""
    return list(dict.fromkeys(suite for name in names for suite in GROUPS.get(name, (name,))))
