"""Intervals, p-values and pass@k against their definitions, tables and simulated draws.

Needs nothing. A few seconds.
"""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.statistics import (
    Z95,
    clustered_interval,
    mcnemar_p_value,
    mean_interval,
    paired_difference_interval,
    pass_at_k,
    wilson_interval,
)


def test_known_values() -> None:
    # 0 of n: [0, z^2 / (n + z^2)]; 50 of 100 from the usual tables.
    low, high = wilson_interval(0, 10)
    assert (low, high) == (pytest.approx(0, abs=1e-12), pytest.approx(Z95**2 / (10 + Z95**2)))
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=5e-5)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_are_where_the_score_test_just_accepts(pair: tuple[int, int]) -> None:
    correct, n = pair
    for end in wilson_interval(correct, n):
        assert (correct / n - end) ** 2 == pytest.approx(Z95**2 * end * (1 - end) / n, abs=1e-12)


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (2, 1), (-1, 3)])
def test_what_is_no_proportion_is_refused(correct: int, n: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(correct, n)


# Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3 (score, no continuity
# correction), to 4 decimals.
@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_newcombes_table(correct: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(correct, n) == (
        pytest.approx(low, abs=5e-5),
        pytest.approx(high, abs=5e-5),
    )


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_share_stays_in_0_to_1_and_mirrors(pair: tuple[int, int]) -> None:
    correct, n = pair
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    assert low < high
    # Right and wrong answers change places: a few roundings of numbers below 1.
    assert wilson_interval(n - correct, n) == (
        pytest.approx(1 - high, abs=1e-12),
        pytest.approx(1 - low, abs=1e-12),
    )


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_with_one_sample_the_interval_is_wilsons(passed: list[bool]) -> None:
    shares = [float(one) for one in passed]
    assert clustered_interval(shares, [1] * len(shares)) == wilson_interval(
        sum(passed), len(passed)
    )


@given(
    st.integers(1, 12).flatmap(
        lambda k: st.tuples(st.just(k), st.lists(st.integers(0, k), min_size=1, max_size=60))
    )
)
def test_a_mean_lies_within_its_own_interval(case: tuple[int, list[int]]) -> None:
    samples, counts = case
    shares = [count / samples for count in counts]
    low, high = clustered_interval(shares, [samples] * len(shares))
    mean = sum(shares) / len(shares)
    assert 0 <= low <= mean + 1e-12 and mean - 1e-12 <= high <= 1 and low < high


def test_samples_that_are_alike_count_as_one() -> None:
    shares = [1.0] * 30 + [0.0] * 70
    assert clustered_interval(shares, [10] * 100) == wilson_interval(30, 100)
    # And samples of problems that are all alike as independent ones.
    assert clustered_interval([0.3] * 100, [10] * 100) == pytest.approx(wilson_interval(300, 1000))


def test_a_problem_with_few_samples_counts_with_few() -> None:
    """Unlike numbers of samples: at most the independent ones whose mean varies as much."""
    expected = 10**2 / (5 / 2 + 5 / 100)  # of 510 samples
    found = clustered_interval([0.5] * 10, [2] * 5 + [100] * 5)
    assert found == pytest.approx(wilson_interval(expected / 2, expected))
    # And a handful of problems that are alike may be so by chance.
    assert clustered_interval([0.5] * 2, [2, 100]) == wilson_interval(1, 2)


def test_the_interval_of_several_samples_covers() -> None:
    """Of 400 draws of 100 problems with 4 samples, at least 92 % hold the mean (nominal: 95 %)."""
    draw, held = random.Random(0), 0
    for _ in range(400):
        shares = []
        for _ in range(100):
            chance = draw.betavariate(0.6, 1.4)  # 0.3 on average
            shares.append(sum(draw.random() < chance for _ in range(4)) / 4)
        low, high = clustered_interval(shares, [4] * 100)
        held += low <= 0.3 <= high
    assert held / 400 >= 0.92


@given(
    st.lists(
        st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
        min_size=1,
        max_size=8,
    )
)
def test_the_interval_of_a_mean_of_means_holds_it(pairs: list[tuple[int, int]]) -> None:
    means = [correct / n for correct, n in pairs]
    intervals = [wilson_interval(*pair) for pair in pairs]
    low, high = mean_interval(means, intervals)
    mean = sum(means) / len(means)
    assert -1e-12 <= low <= mean <= high <= 1 + 1e-12
    if len(pairs) == 1:
        assert (low, high) == pytest.approx(intervals[0])


def test_the_interval_of_a_mean_of_means_covers() -> None:
    chances = [0.9, 0.8, 0.75, 0.5, 0.62, 0.83, 0.1, 0.7]
    draw, held = random.Random(0), 0
    for _ in range(400):
        counts = [sum(draw.random() < chance for _ in range(50)) for chance in chances]
        intervals = [wilson_interval(count, 50) for count in counts]
        low, high = mean_interval([count / 50 for count in counts], intervals)
        held += low <= sum(chances) / 8 <= high
    assert 0.92 <= held / 400 <= 0.98


def test_mcnemar_is_the_binomial_test() -> None:
    assert mcnemar_p_value(0, 0) == 1
    assert mcnemar_p_value(0, 6) == pytest.approx(2 / 64)
    assert mcnemar_p_value(2, 8) == mcnemar_p_value(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)


def test_the_interval_covers() -> None:
    """Of 400 draws of 200 pairs, at least 92 % of intervals hold the difference (nominal: 95 %)."""
    draw, held = random.Random(0), 0
    for _ in range(400):
        kinds = draw.choices(["won", "lost", "same"], [0.15, 0.10, 0.75], k=200)
        low, high = paired_difference_interval(kinds.count("lost"), kinds.count("won"), 200)
        held += low <= 0.05 <= high
    assert held / 400 >= 0.92


@given(
    st.integers(1, 60).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))
    )
)
def test_pass_at_k_is_the_chance_that_one_of_k_is_right(case: tuple[int, int, int]) -> None:
    n, correct, k = case
    found = pass_at_k(n, correct, k)
    assert 0 <= found <= 1
    assert pass_at_k(n, correct, 1) == pytest.approx(correct / n)
    missed = math.prod((n - correct - i) / (n - i) for i in range(k)) if n - correct >= k else 0
    assert found == pytest.approx(1 - missed)
