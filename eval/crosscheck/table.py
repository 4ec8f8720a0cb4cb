"""Compare our verdicts with another harness's, problem by problem."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from eval.tasks.base import GRADERS


class Comparison(NamedTuple):
    """One benchmark against one rule of another harness."""

    benchmark: str
    against: str
    theirs: dict[str, bool]  # problem -> their verdict, or whether their response is the same text
    texts: bool = False  # responses are compared, not verdicts
    outputs: Mapping[str, str] = MappingProxyType({})  # problem -> their response, if they made one


def find_differences(comparison: Comparison, ours: dict[str, dict]) -> list[dict]:
    """Return our row of each problem on which the two differ, with what they say of it.

    Args:
        ours: problem -> {id, reference, output, strict, literature} of the benchmark.

    Returns:
        Rows {suite, against, id, reference, output, strict, literature, theirs}, with their_output
        where they made a response.
    """
    differences = []
    for problem, theirs in comparison.theirs.items():
        row = ours[problem]
        expected = True if comparison.texts else row["strict"]
        if theirs == expected:
            continue
        difference = {"suite": comparison.benchmark, "against": comparison.against}
        for key in ("id", "reference", "output", *GRADERS):
            difference[key] = row[key]
        difference["theirs"] = theirs
        if problem in comparison.outputs:
            difference["their_output"] = comparison.outputs[problem]
        differences.append(difference)
    return differences


def render_comparisons(comparisons: Iterable[Comparison], ours: dict[str, dict[str, dict]]) -> str:
    """Render a Markdown table: scores on the same n problems, and on how many the two differ.

    Args:
        ours: benchmark -> what `find_differences` takes.
    """
    head = [
        "benchmark",
        "against",
        "our strict (%)",
        "our literature (%)",
        "theirs (%)",
        "n",
        "differ",
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for comparison in comparisons:
        cells = _list_cells(comparison, ours[comparison.benchmark])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _list_cells(comparison: Comparison, ours: dict[str, dict]) -> list[str]:
    rows = [ours[problem] for problem in comparison.theirs]
    theirs = list(comparison.theirs.values())
    their_score = f"{sum(theirs)} same texts" if comparison.texts else _format_percent(theirs)
    return [
        comparison.benchmark,
        comparison.against,
        *(_format_percent([row[grader] for row in rows]) for grader in GRADERS),
        their_score,
        str(len(rows)),
        str(len(find_differences(comparison, ours))),
    ]


def _format_percent(passed: Sequence[bool]) -> str:
    return f"{100 * sum(passed) / len(passed):.1f}"
