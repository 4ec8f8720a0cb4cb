"""Two sets of graded responses to the same problems: the paired difference, and the problems that changed."""

from collections.abc import Sequence

from eval.errors import EvalError
from eval.statistics import mcnemar, paired_interval
from eval.tasks.base import Grader


def compare(
    first: Sequence[dict], second: Sequence[dict], grader: Grader = "strict"
) -> dict[str, dict]:
    """Rows of two generations.jsonl, by suite: accuracies, difference, its 95 % interval, p-value and what changed.

    Of several samples the first counts. Only problems that both have are compared, and both numbers are given.

    Raises:
        EvalError: they have no graded problem in common, or differ in a problem's reference.
    """
    graded = [
        {
            (row["suite"], row["id"]): row
            for row in rows
            if row.get("sample", 0) == 0 and grader in row
        }
        for rows in (first, second)
    ]
    common = [key for key in graded[0] if key in graded[1]]
    if not common:
        raise EvalError(
            "--compare: the two have no graded problem in common; compare folders of launch/evaluate.py"
        )
    found: dict[str, dict] = {}
    for suite in dict.fromkeys(suite for suite, _ in common):
        ids = [problem for of, problem in common if of == suite]
        pairs = [(graded[0][suite, problem], graded[1][suite, problem]) for problem in ids]
        for a, b in pairs:
            if a["reference"] != b["reference"]:
                raise EvalError(f"--compare: {a['id']} of {suite} is not the same problem in both")
        lost = [a["id"] for a, b in pairs if a[grader] and not b[grader]]
        won = [a["id"] for a, b in pairs if b[grader] and not a[grader]]
        n = len(pairs)
        found[suite] = {
            "n": n,
            "only_in_one": sum(of == suite for of, _ in graded[0].keys() ^ graded[1].keys()),
            "first": sum(a[grader] for a, _ in pairs) / n,
            "second": sum(b[grader] for _, b in pairs) / n,
            "difference": (len(won) - len(lost)) / n,
            "interval": list(paired_interval(len(lost), len(won), n)),
            "p": mcnemar(len(lost), len(won)),
            "lost": lost,
            "won": won,
        }
    return found


def describe(found: dict[str, dict], names: tuple[str, str]) -> str:
    """A Markdown table, and for each suite the problems that changed."""
    head = [
        "suite",
        f"{names[0]} (%)",
        f"{names[1]} (%)",
        "difference (points)",
        "95 % interval",
        "p (McNemar)",
        "n",
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for suite, of in found.items():
        low, high = (100 * end for end in of["interval"])
        cells = [
            suite,
            f"{100 * of['first']:.1f}",
            f"{100 * of['second']:.1f}",
            f"{100 * of['difference']:+.1f}",
        ]
        cells += [f"{low:+.1f} to {high:+.1f}", f"{of['p']:.3g}", str(of["n"])]
        lines.append(f"| {' | '.join(cells)} |")
    for suite, of in found.items():
        if of["only_in_one"]:
            lines.append(
                f"\n{suite}: {of['only_in_one']} problems are in one of the two only, and left out"
            )
        for change, ids in (
            ("right in the second only", of["won"]),
            ("right in the first only", of["lost"]),
        ):
            if ids:
                lines.append(f"\n{suite}, {change} ({len(ids)}): {', '.join(ids)}")
    return "\n".join(lines)
