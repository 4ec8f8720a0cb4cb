"""Build the blocks of a table: means by row, the tests between rows, the rates around each best."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from launch.sweeps.curves import RateCurve, collect_rate_curves, format_loss
from launch.sweeps.published import Published, find_published, list_shown
from launch.sweeps.significance import (
    Comparison,
    compare_groups,
    find_best,
    find_winner,
    order_groups,
)
from launch.sweeps.summary import Column, Group, Point, describe_seeds, list_columns
from launch.sweeps.table import Rate, Sweep, list_benchmarks

RATES: dict[Rate, str] = {
    "recipe": "at the recipe's learning rate",
    "own": "each at its own learning rate",
    "below": "each at the rate next below its own",
    "above": "each at the rate next above its own",
    "common": "all at one learning rate",
}
NEIGHBOURS = "Around each row's own learning rate, held-out loss"
MAX_TESTS = 15  # of a column that are all shown; of more, those of the best row


class Entry(NamedTuple):
    """The text in one place of a rendered table."""

    text: str
    is_best: bool = False  # of its column in its block
    value: float | None = None  # the number in the text, not rounded


def build_blocks(sweep: Sweep, groups: Sequence[Group]) -> dict[str, list[list[Entry]]]:
    """Return the blocks of the table: one for each learning rate and varied value, then the tests.

    Where learning rates are chosen, a last block has the rates next to each best one.

    Returns:
        Heading -> rows of entries. The first row holds the titles.
    """
    published = find_published(groups, list_benchmarks(sweep.table))
    benchmarks = []  # those that have a published score of a row's protocol, each a column
    for name in [*list_benchmarks(sweep.table), "mean"]:
        if any(name in entry.scores for found in published for entry in list_shown(found)):
            benchmarks.append(name)
    places = {id(group): i for i, group in enumerate(groups)}
    num_rows = len(sweep.table.rows)
    blocks, tests = {}, {}
    for heading, members in list_row_blocks(sweep, groups).items():
        # A mean is compared with those of its own block only, whose columns may be of one task.
        columns = list_columns(sweep, members)
        titles = ["row", "learning rate", "seeds", *(column.title for column in columns)]
        titles += [f"{name} published (%)" for name in benchmarks]
        best = [find_best(members, column, num_rows) for column in columns]
        rows = [[Entry(title) for title in titles]]
        for place, group in enumerate(members):
            are_best = [index == place for index in best]
            shown = list_shown(published[places[id(group)]])
            rows.append(_build_row(group, columns, are_best, benchmarks, shown))
        blocks[heading] = rows
        compared = _build_tests(members, _choose_tested(sweep, columns), num_rows)
        if len(compared) > 1:
            tests[f"Differences, {heading[0].lower()}{heading[1:]}"] = compared
    neighbours = _build_neighbours(collect_rate_curves(sweep))
    return blocks | tests | ({NEIGHBOURS: neighbours} if len(neighbours) > 1 else {})


def _choose_tested(sweep: Sweep, columns: Sequence[Column]) -> list[Column]:
    """Return the columns whose tests are shown; the others' are in the CSV file."""
    benchmarks = list_benchmarks(sweep.table)
    score = "mean (%)" if len(benchmarks) > 1 else f"{benchmarks[0]} (%)" if benchmarks else ""
    shown = (score, "held-out loss", "other-text loss after")
    return [c for c in columns if c.title in shown or c.title.endswith(", last epoch (%)")]


def _build_tests(
    groups: Sequence[Group], columns: Sequence[Column], num_rows: int
) -> list[list[Entry]]:
    """Return the tests of the rows of one block: of every pair, or of the best with every other."""
    titles = ["column", "rows", "difference", "pairs", "p", "p, Holm"]
    rows = [[Entry(title) for title in titles]]
    for column in columns:
        comparisons = compare_groups(groups, column, num_rows)
        if len(comparisons) > MAX_TESTS:
            best = order_groups(groups, column)[0]
            comparisons = [c for c in comparisons if best in (c.first, c.second)]
        for comparison in comparisons:
            rows.append(_build_test(groups, column, comparison))
    return rows


def _build_test(groups: Sequence[Group], column: Column, comparison: Comparison) -> list[Entry]:
    """Return the row of one test."""
    names = " - ".join(groups[i].label for i in (comparison.first, comparison.second))
    mean, half = comparison.difference
    has_winner = find_winner(groups, column, comparison) is not None
    return [
        Entry(column.title),
        Entry(names),
        Entry(f"{mean:+{column.form}} ± {half:{column.form}}", has_winner, mean),
        Entry(str(comparison.num_pairs), value=comparison.num_pairs),
        Entry(f"{comparison.p:.3g}", value=comparison.p),
        Entry(f"{comparison.adjusted:.3g}", has_winner, comparison.adjusted),
    ]


def _build_neighbours(curves: Sequence[RateCurve]) -> list[list[Entry]]:
    """Return the rates around each row's best: rate, loss on the seed that chose, fresh seeds."""
    titles = ["row", "next lower rate: loss", "own rate: loss", "next higher rate: loss"]
    rows = [[Entry(title) for title in titles]]
    for curve in curves:
        if curve.own is not None:
            texts = map(format_loss, curve.list_neighbours())
            rows.append([Entry(curve.label), *map(Entry, texts)])
    return rows


def count_tests(sweep: Sweep, groups: Sequence[Group]) -> tuple[int, int] | None:
    """Return the most pairs of seeds of a test, and the tests of a family; None without a test."""
    num_rows = len(sweep.table.rows)
    columns = _choose_tested(sweep, list_columns(sweep, groups))
    num_pairs = []
    for members in list_row_blocks(sweep, groups).values():
        for column in columns:
            num_pairs += [test.num_pairs for test in compare_groups(members, column, num_rows)]
    return (max(num_pairs), math.comb(num_rows, 2)) if num_pairs else None


def _build_row(
    group: Group,
    columns: Sequence[Column],
    are_best: Sequence[bool],
    benchmarks: Sequence[str],
    published: Sequence[Published],
) -> list[Entry]:
    """Return a group's row of the table: its `columns`, then published scores of `benchmarks`."""
    at_edge = " (end of its grid)" if group.at_edge else ""
    row = [Entry(group.label), Entry(f"{group.lr:g}{at_edge}", value=group.lr)]
    seeds = describe_seeds(len(group.results), group.num_wanted, group.num_diverged)
    row.append(Entry(seeds, value=len(group.results)))
    for column, is_best in zip(columns, are_best, strict=True):
        point = group.estimate_column(column)
        text = _format_point(point, column)
        if column.has_median and len(group.get_values(column)) > 1:
            text += f", median {group.find_median(column):{column.form}}"
        row.append(Entry(text, is_best, point and point.mean))
    for name in benchmarks:
        # Sources may differ: every value is shown.
        values = [entry.scores[name] for entry in published if name in entry.scores]
        text = "; ".join(f"{value:.2f}" for value in values)
        row.append(Entry(text, value=values[0] if values else None))
    return row


def list_row_blocks(sweep: Sweep, groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Return the groups that stand in one block, by its heading.

    Those next to a row's own rate are in none: `_build_neighbours` shows them.
    """
    vary = sweep.table.vary
    found: dict[str, list[Group]] = {}
    for group in groups:
        if group.rate in ("below", "above"):
            continue
        rate = RATES[group.rate]
        heading = f"{vary.fields[0]} = {group.value}, {rate}" if vary else rate
        found.setdefault(heading[0].upper() + heading[1:], []).append(group)
    return found


def _format_point(point: Point | None, column: Column) -> str:
    """Return a mean, with its interval where the column's numbers are compared."""
    if point is None:
        return ""
    if point.half is None or column.better is None:
        return f"{point.mean:{column.form}}"
    return f"{point.mean:{column.form}} ± {point.half:{column.form}}"
