"""Paired differences: the numbers, and what changed."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.compare import compare, describe
from eval.errors import EvalError
from eval.statistics import mcnemar, paired_interval, pass_at_k


def rows(passed: str, suite: str = "gsm8k", **more: object) -> list[dict]:
    return [
        {"suite": suite, "id": f"{suite}/{i}", "sample": 0, "reference": "1", "strict": mark == "1"}
        | more
        for i, mark in enumerate(passed)
    ]


def test_the_difference_and_what_changed() -> None:
    found = compare(rows("110010"), rows("011011"))["gsm8k"]
    assert (found["first"], found["second"], found["n"]) == (0.5, 4 / 6, 6)
    assert (found["won"], found["lost"]) == (["gsm8k/2", "gsm8k/5"], ["gsm8k/0"])
    assert found["difference"] == pytest.approx(1 / 6)
    low, high = found["interval"]
    assert low < found["difference"] < high
    assert found["p"] == 1.0
    text = describe({"gsm8k": found}, ("a", "b"))
    assert "| gsm8k | 50.0 | 66.7 | +16.7 |" in text
    assert "right in the second only (2): gsm8k/2, gsm8k/5" in text


def test_only_common_problems_count_and_the_others_are_counted() -> None:
    found = compare(rows("1111"), rows("10") + rows("1", "math500"))
    assert found.keys() == {"gsm8k"}
    assert (found["gsm8k"]["n"], found["gsm8k"]["only_in_one"]) == (2, 2)


def test_other_problems_and_ungraded_ones_are_refused() -> None:
    with pytest.raises(EvalError, match="not the same problem"):
        compare(rows("1"), rows("1", reference="2"))
    with pytest.raises(EvalError, match="no graded problem in common"):
        compare(rows("1"), [{"suite": "gsm8k", "id": "gsm8k/0", "sample": 0}])


def test_mcnemar_is_the_binomial_test() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(2, 8) == mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)


def test_the_interval_covers() -> None:
    """Of 400 draws of 200 pairs with a known difference at least 92 % of intervals hold it (nominal: 95 %)."""
    import random

    draw, held = random.Random(0), 0
    for _ in range(400):
        kinds = draw.choices(["won", "lost", "same"], [0.15, 0.10, 0.75], k=200)
        low, high = paired_interval(kinds.count("lost"), kinds.count("won"), 200)
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
