"""Test which rows of a table differ: paired over seeds, with Holm's correction.

Runs of one seed share the order of the training data, so rows are compared seed by seed: a two-sided
paired t-test over the seeds that both have. The tests of one column, of every pair of rows in a
block, are a family. S. Holm's procedure (Scandinavian Journal of Statistics 6, 1979) keeps the
chance of any false difference in it below 5 %. One seed decides nothing. Neither do differences
without spread, since few seeds with coarse scores give equal ones by chance. A pair that cannot be
tested, or not yet, remains in the family.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

from launch.sweeps.summary import Column, Group, Point, estimate_mean

SIGNIFICANCE_LEVEL = 0.05
ROUNDING = 1e-9  # relative: numbers that are no further apart are equal


class Comparison(NamedTuple):
    """The test of two rows in one column."""

    first: int  # index of a group
    second: int
    difference: Point  # first minus second, over the seeds that both have
    num_pairs: int
    p: float  # of this test alone
    adjusted: float  # by Holm's correction


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted by Holm's step-down procedure, in the same order."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, index in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def pair_values(
    first: dict[int, float], second: dict[int, float]
) -> tuple[list[float], list[float]] | None:
    """Return the numbers of two rows (seed -> number) on their common seeds, in one order.

    Returns:
        None for fewer than two common seeds, or if a number is not finite.
    """
    seeds = sorted(first.keys() & second.keys())
    values = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    is_finite = all(map(math.isfinite, values[0] + values[1]))
    return values if len(seeds) > 1 and is_finite else None


def compare_pairs(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the p value of the paired t-test of two rows' numbers, seed by seed.

    Returns:
        None where there is no test: differences without spread.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    size = max(map(abs, [*first, *second]))
    if max(differences) - min(differences) <= ROUNDING * size:
        return None
    return float(stats.ttest_rel(first, second).pvalue)


def compare_groups(groups: Sequence[Group], column: Column, num_rows: int) -> list[Comparison]:
    """Test every pair of groups in a column, and correct for all pairs of rows of their block.

    A pair without a test counts with p = 1: whether a pair is in the family must not depend on its
    numbers, nor on which runs have finished.

    Args:
        num_rows: of the block, those that have no group yet among them.

    Returns:
        The comparisons of the pairs that have a test.
    """
    values = [group.get_values(column) for group in groups]
    tested = []
    for i, j in itertools.combinations(range(len(groups)), 2):
        paired = pair_values(values[i], values[j])
        p = None if paired is None else compare_pairs(*paired)
        if p is not None:
            tested.append((i, j, paired, p))
    num_untested = math.comb(num_rows, 2) - len(tested)
    adjusted = adjust_holm([p for *_, p in tested] + [1.0] * num_untested)
    comparisons = []
    for (i, j, (first, second), p), corrected in zip(tested, adjusted, strict=False):
        difference = estimate_mean([a - b for a, b in zip(first, second, strict=True)])
        comparisons.append(Comparison(i, j, difference, len(first), p, corrected))
    return comparisons


def order_groups(groups: Sequence[Group], column: Column) -> list[int]:
    """Return the indices of the groups with a finite mean, the best first."""
    means = {}
    for i, group in enumerate(groups):
        point = group.estimate_column(column)
        if point is not None and math.isfinite(point.mean):  # NaN has no place in an order
            means[i] = point.mean
    return sorted(means, key=means.get, reverse=column.better == "high")


def find_winner(groups: Sequence[Group], column: Column, comparison: Comparison) -> int | None:
    """Return the index of the better one of two groups that differ, if any.

    A group with a diverged seed never is: its mean leaves out its worst result.
    """
    if comparison.adjusted >= SIGNIFICANCE_LEVEL:
        return None
    first_leads = (comparison.difference.mean > 0) == (column.better == "high")
    leader = comparison.first if first_leads else comparison.second
    return None if groups[leader].num_diverged else leader


def find_best(groups: Sequence[Group], column: Column, num_rows: int) -> int | None:
    """Return the index of the group whose mean is best and differs from the next best, if any.

    Rows may lack different seeds, so a row that leads by its mean may be behind on the seeds that
    both have. Then none is best.

    Args:
        num_rows: see `compare_groups`.
    """
    order = order_groups(groups, column)
    if column.better is None or len(order) < 2:
        return None
    for comparison in compare_groups(groups, column, num_rows):
        if {comparison.first, comparison.second} == set(order[:2]):
            winner = find_winner(groups, column, comparison)
            return winner if winner == order[0] else None
    return None


def describe_power(num_pairs: int, num_tests: int) -> str:
    """Say what tests of so many pairs of seeds can show, and what they cannot."""
    needed = []
    for level in (SIGNIFICANCE_LEVEL, SIGNIFICANCE_LEVEL / num_tests):
        quantile = stats.t.ppf(1 - level / 2, num_pairs - 1)
        needed.append(f"{quantile / math.sqrt(num_pairs):.1f}")
    alone = f"a mean difference above {needed[0]} times its standard deviation over the seeds"
    corrected = f", and above {needed[1]} times for the first of {num_tests} corrected tests"
    return (
        f"A test of {num_pairs} pairs reaches p < {SIGNIFICANCE_LEVEL:g} only with {alone}"
        f"{corrected if num_tests > 1 else ''}; a test by ranks (Wilcoxon's) of so few pairs cannot "
        f"go below p = {2 / 2**num_pairs:.2g}. It can show a large and steady difference. That it "
        "shows none does not show that two rows are equal."
    )
