"""Wilson's interval against values worked by hand and against its definition."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.statistics import Z95, wilson


def test_known_values() -> None:
    # 0 of n: [0, z^2 / (n + z^2)]; 50 of 100 from the usual tables.
    low, high = wilson(0, 10)
    assert (low, high) == (pytest.approx(0, abs=1e-12), pytest.approx(Z95**2 / (10 + Z95**2)))
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=5e-5)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_are_where_the_score_test_just_accepts(pair: tuple[int, int]) -> None:
    correct, n = pair
    for end in wilson(correct, n):
        assert (correct / n - end) ** 2 == pytest.approx(Z95**2 * end * (1 - end) / n, abs=1e-12)


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (2, 1), (-1, 3)])
def test_what_is_no_proportion_is_refused(correct: int, n: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson(correct, n)


# Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3 (score, no continuity correction), 4 decimals.
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
    assert wilson(correct, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_share_stays_in_0_to_1_and_mirrors(pair: tuple[int, int]) -> None:
    correct, n = pair
    low, high = wilson(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    assert low < high
    # Right and wrong answers change places: a few roundings of numbers below 1.
    assert wilson(n - correct, n) == (
        pytest.approx(1 - high, abs=1e-12),
        pytest.approx(1 - low, abs=1e-12),
    )
