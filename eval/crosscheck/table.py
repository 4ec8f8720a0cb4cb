"""Our verdicts beside another harness's, problem by problem."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Comparison(NamedTuple):
    """One suite against one rule of another harness."""

    suite: str
    against: str
    theirs: dict[str, bool]  # problem -> their verdict, or whether their response is the same text
    texts: bool = False  # it compares responses, not verdicts
    outputs: dict[str, str] = {}  # noqa: RUF012 (never changed) problem -> their response, where they made one


def differing(comparison: Comparison, ours: dict[str, dict]) -> list[dict]:
    """The problems on which the two differ: ours, with their verdict and their response where they made one.

    Args:
        ours: problem -> {id, reference, output, strict, literature} of the suite.
    """
    found = []
    for problem, theirs in comparison.theirs.items():
        row = ours[problem]
        if theirs != (True if comparison.texts else row["strict"]):
            kept = {key: row[key] for key in ("id", "reference", "output", "strict", "literature")}
            other = (
                {"their_output": comparison.outputs[problem]}
                if problem in comparison.outputs
                else {}
            )
            found.append(
                {
                    "suite": comparison.suite,
                    "against": comparison.against,
                    **kept,
                    "theirs": theirs,
                    **other,
                }
            )
    return found


def describe(comparisons: Iterable[Comparison], ours: dict[str, dict[str, dict]]) -> str:
    """A Markdown table, a row for each comparison: percent of the same n problems, and on how many the two differ."""
    head = ["suite", "against", "our strict (%)", "our literature (%)", "theirs (%)", "n", "differ"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for comparison in comparisons:
        rows = [ours[comparison.suite][problem] for problem in comparison.theirs]
        theirs = list(comparison.theirs.values())
        cells = [
            comparison.suite,
            comparison.against,
            *(_percent([row[g] for row in rows]) for g in _GRADERS),
        ]
        cells += [
            f"{sum(theirs)} same texts" if comparison.texts else _percent(theirs),
            str(len(rows)),
        ]
        lines.append(
            f"| {' | '.join([*cells, str(len(differing(comparison, ours[comparison.suite])))])} |"
        )
    return "\n".join(lines)


_GRADERS = ("strict", "literature")


def _percent(passed: Sequence[bool]) -> str:
    return f"{100 * sum(passed) / len(passed):.1f}"
