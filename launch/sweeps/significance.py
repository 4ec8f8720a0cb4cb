"""Test which rows of a table differ: paired over seeds, with Holm's correction.

Runs of one seed share the order of the training data, so rows are compared seed by seed: a two-sided
paired t-test over the seeds that both have. The tests of one column, of every pair of rows in a
block, are a family. S. Holm's procedure (Scandinavian Journal of Statistics 6, 1979) keeps the
chance of any false difference in it below 5 %. One seed decides nothing. Neither do differences
without spread, since few seeds with coarse scores give equal ones by chance: such a pair has no test,
but remains in the family.
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
    family: int  # pairs that the correction counts


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted by Holm's step-down procedure, in the same order."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, index in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def compare_pairs(first: dict[int, float], second: dict[int, float]) -> float | None:
    """Return the p value of the paired t-test of two rows (seed -> number).

    Returns:
        None where there is no test: no values to pair, or differences without spread.
    """
    values = pair_values(first, second)
    if values is None:
        return None
    differences = [a - b for a, b in zip(*values, strict=True)]
    size = max(map(abs, values[0] + values[1]))
    if max(differences) - min(differences) <= ROUNDING * size:
        return None
    return float(stats.ttest_rel(*values).pvalue)


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


def compare_groups(groups: Sequence[Group], column: Column) -> list[Comparison]:
    """Test every pair of groups in a column, and correct for the number of pairs.

    Pairs without spread have no test, but count in the correction: whether a pair is in the family
    must not depend on its numbers.
    """
    values = [group.get_values(column) for group in groups]
    family = []
    for i, j in itertools.combinations(range(len(groups)), 2):
        if pair_values(values[i], values[j]) is not None:
            family.append((i, j, compare_pairs(values[i], values[j])))
    adjusted = adjust_holm([1.0 if p is None else p for _, _, p in family])
    comparisons = []
    for (i, j, p), corrected in zip(family, adjusted, strict=True):
        if p is None:
            continue
        first, second = pair_values(values[i], values[j])
        difference = estimate_mean([a - b for a, b in zip(first, second, strict=True)])
        comparisons.append(Comparison(i, j, difference, len(first), p, corrected, len(family)))
    return comparisons


def order_groups(groups: Sequence[Group], column: Column) -> list[int]:
    """Return the indices of the groups with a finite mean, the best first."""
    means = {}
    for i, group in enumerate(groups):
        point = group.estimate_column(column)
        if point is not None and math.isfinite(point.mean):  # NaN has no place in an order
            means[i] = point.mean
    return sorted(means, key=means.get, reverse=column.better == "high")


def find_best(groups: Sequence[Group], column: Column) -> int | None:
    """Return the index of the group whose mean is best and differs from the next best, if any.

    Rows may lack different seeds, so a row that leads by its mean may be behind on the seeds that
    both have. Then none is best. Nor is one where the leader has a diverged seed: its mean leaves
    out its worst result.
    """
    order = order_groups(groups, column)
    if column.better is None or len(order) < 2 or groups[order[0]].num_diverged:
        return None
    for comparison in compare_groups(groups, column):
        is_of_these = {comparison.first, comparison.second} == set(order[:2])
        if is_of_these and comparison.adjusted < SIGNIFICANCE_LEVEL:
            first_leads = (comparison.difference.mean > 0) == (column.better == "high")
            leader = comparison.first if first_leads else comparison.second
            return leader if leader == order[0] else None
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
