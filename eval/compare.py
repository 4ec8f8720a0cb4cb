"""Compare two sets of graded responses to the same problems, pair by pair."""

from collections.abc import Sequence

from eval.errors import EvalError
from eval.statistics import mcnemar_p_value, paired_difference_interval


def compare_responses(first: Sequence[dict], second: Sequence[dict]) -> dict[str, dict]:
    """Compare the first samples of two sets of graded responses, benchmark by benchmark.

    Only problems that both sets have are compared, by the strict grader.

    Args:
        first: rows of a generations.jsonl: {suite, id, sample, reference, strict}.

    Returns:
        Benchmark -> {n (problems in both), only_in_one (problems), samples (the most responses to a
        problem in the first and in the second), first and second (accuracies, as fractions),
        difference (second - first), interval (its 95 % interval), p (McNemar), lost (ids right in
        the first only), won (ids right in the second only)}.

    Raises:
        EvalError: the two have no graded problem in common, or differ in a problem's reference or
            question.
    """
    rows_a, rows_b = _index_graded(first), _index_graded(second)
    pairs: dict[str, list[tuple[dict, dict]]] = {}
    for (benchmark, problem_id), row in rows_a.items():
        other = rows_b.get((benchmark, problem_id))
        if other is None:
            continue
        if not _have_same_problem(row, other):
            raise EvalError(
                f"{problem_id} of {benchmark} is not the same problem in both", subject="compare"
            )
        pairs.setdefault(benchmark, []).append((row, other))
    if not pairs:
        raise EvalError(
            "the two have no graded problem in common; compare the folders of two evaluations",
            subject="compare",
        )
    found = {}
    for benchmark, of_benchmark in pairs.items():
        only_in_one = sum(key[0] == benchmark for key in rows_a.keys() ^ rows_b.keys())
        samples = [_count_samples(rows, benchmark) for rows in (first, second)]
        found[benchmark] = _compare_pairs(of_benchmark, only_in_one) | {"samples": samples}
    return found


def list_uncompared(first: Sequence[dict], second: Sequence[dict]) -> list[str]:
    """List the benchmarks of either set that have no graded problem in both, in alphabetical order."""
    keys_a, keys_b = _index_graded(first).keys(), _index_graded(second).keys()
    benchmarks = {benchmark for benchmark, _ in keys_a | keys_b}
    return sorted(benchmarks - {benchmark for benchmark, _ in keys_a & keys_b})


def _have_same_problem(row: dict, other: dict) -> bool:
    """Return whether two rows of one id answer the same problem. Some rows have no question."""
    questions = (row.get("question"), other.get("question"))
    is_same_question = None in questions or questions[0] == questions[1]
    return is_same_question and row["reference"] == other["reference"]


def _index_graded(rows: Sequence[dict]) -> dict[tuple[str, str], dict]:
    """Return (benchmark, problem) -> its row, for the first samples that have a grade."""
    indexed = {}
    for row in rows:
        # A file that is still being made has rows without grades.
        if row.get("sample", 0) == 0 and "strict" in row:
            indexed[row["suite"], row["id"]] = row
    return indexed


def _count_samples(rows: Sequence[dict], benchmark: str) -> int:
    """Return the most responses to a problem of `benchmark` that have a grade."""
    graded = [row for row in rows if row["suite"] == benchmark and "strict" in row]
    return max(row.get("sample", 0) for row in graded) + 1


def _compare_pairs(pairs: list[tuple[dict, dict]], only_in_one: int) -> dict:
    lost = [a["id"] for a, b in pairs if a["strict"] and not b["strict"]]
    won = [a["id"] for a, b in pairs if b["strict"] and not a["strict"]]
    n = len(pairs)
    return {
        "n": n,
        "only_in_one": only_in_one,
        "first": sum(a["strict"] for a, _ in pairs) / n,
        "second": sum(b["strict"] for _, b in pairs) / n,
        "difference": (len(won) - len(lost)) / n,
        "interval": list(paired_difference_interval(len(lost), len(won), n)),
        "p": mcnemar_p_value(len(lost), len(won)),
        "lost": lost,
        "won": won,
    }


def render_comparison(
    comparisons: dict[str, dict], names: tuple[str, str], uncompared: Sequence[str] = ()
) -> str:
    """Render what `compare_responses` returns as a Markdown table and lists of changed problems.

    Args:
        names: of the first and the second set.
        uncompared: what `list_uncompared` returns.
    """
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
    lines += [_render_row(name, comparison) for name, comparison in comparisons.items()]
    for name, comparison in comparisons.items():
        if max(comparison["samples"]) > 1:
            counts = " and ".join(map(str, dict.fromkeys(comparison["samples"])))
            lines.append(
                f"\n{name}: only the first of {counts} responses to each problem is compared"
            )
        if comparison["only_in_one"]:
            lines.append(
                f"\n{name}: {comparison['only_in_one']} problems are in one of the two only, "
                "and left out"
            )
        lines += _render_changes(name, "right in the second only", comparison["won"])
        lines += _render_changes(name, "right in the first only", comparison["lost"])
    lines += [f"\n{name}: has problems in one of the two only, not compared" for name in uncompared]
    return "\n".join(lines)


def _render_row(name: str, comparison: dict) -> str:
    low, high = (100 * end for end in comparison["interval"])
    cells = [
        name,
        f"{100 * comparison['first']:.1f}",
        f"{100 * comparison['second']:.1f}",
        f"{100 * comparison['difference']:+.1f}",
        f"{low:+.1f} to {high:+.1f}",
        f"{comparison['p']:.3g}",
        str(comparison["n"]),
    ]
    return f"| {' | '.join(cells)} |"


def _render_changes(name: str, change: str, ids: list[str]) -> list[str]:
    return [f"\n{name}, {change} ({len(ids)}): {', '.join(ids)}"] if ids else []
