"""The comparison of two sets of responses: its numbers, and what changed. Needs nothing; a second."""

import pytest

from eval.compare import compare_responses, list_uncompared, render_comparison
from eval.errors import EvalError


def make_rows(passed: str, suite: str = "gsm8k", **more: object) -> list[dict]:
    return [
        {"suite": suite, "id": f"{suite}/{i}", "sample": 0, "reference": "1", "strict": mark == "1"}
        | more
        for i, mark in enumerate(passed)
    ]


def test_the_difference_and_what_changed() -> None:
    found = compare_responses(make_rows("110010"), make_rows("011011"))["gsm8k"]
    assert (found["first"], found["second"], found["n"]) == (0.5, 4 / 6, 6)
    assert (found["won"], found["lost"]) == (["gsm8k/2", "gsm8k/5"], ["gsm8k/0"])
    assert found["difference"] == pytest.approx(1 / 6)
    low, high = found["interval"]
    assert low < found["difference"] < high
    assert found["p"] == 1.0
    text = render_comparison({"gsm8k": found}, ("a", "b"))
    assert "| gsm8k | 50.0 | 66.7 | +16.7 |" in text
    assert "right in the second only (2): gsm8k/2, gsm8k/5" in text


def test_of_several_responses_the_first_is_compared_and_a_line_says_so() -> None:
    single, several = make_rows("10"), make_rows("11") + make_rows("00", sample=2)
    several += [{"suite": "gsm8k", "id": "gsm8k/0", "sample": 9}]  # not graded
    line = "\n\ngsm8k: only the first of 3 responses to each problem is compared\n"
    found = compare_responses(several, several)
    assert (found["gsm8k"]["n"], found["gsm8k"]["first"]) == (2, 1)
    assert line in render_comparison(found, ("a", "b")) + "\n"
    found = compare_responses(single, several)
    assert "first of 1 and 3 responses" in render_comparison(found, ("a", "b"))
    assert "responses" not in render_comparison(compare_responses(single, single), ("a", "b"))


def test_only_common_problems_count_and_the_others_are_counted() -> None:
    both = make_rows("1111"), make_rows("10") + make_rows("1", "math500")
    found = compare_responses(*both)
    assert found.keys() == {"gsm8k"}
    assert (found["gsm8k"]["n"], found["gsm8k"]["only_in_one"]) == (2, 2)
    for order in (both, both[::-1]):
        assert list_uncompared(*order) == ["math500"]
    text = render_comparison(found, ("a", "b"), list_uncompared(*both))
    assert "\nmath500: has problems in one of the two only, not compared" in text


def test_other_problems_and_ungraded_ones_are_refused() -> None:
    with pytest.raises(EvalError, match="not the same problem"):
        compare_responses(make_rows("1"), make_rows("1", reference="2"))
    asked, asked_else = make_rows("1", question="1?"), make_rows("1", question="2 - 1?")
    with pytest.raises(EvalError, match="gsm8k/0 of gsm8k is not the same problem"):
        compare_responses(asked, asked_else)
    for other in (asked, make_rows("1")):  # a row of another program may have no question
        assert compare_responses(asked, other)["gsm8k"]["n"] == 1
    with pytest.raises(EvalError, match="no graded problem in common"):
        compare_responses(make_rows("1"), [{"suite": "gsm8k", "id": "gsm8k/0", "sample": 0}])
