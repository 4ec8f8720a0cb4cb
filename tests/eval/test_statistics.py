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
    mcnemar_p_value,
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
