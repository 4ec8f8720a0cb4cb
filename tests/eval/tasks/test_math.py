"""Both graders of MATH on labelled responses, every gold answer, and hostile text.

Needs the shared MATH and MATH-500 for the gold answers. Half a minute, most of it math-verify.
"""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.equivalence import are_equivalent
from eval.sandbox.watch import read_usage
from eval.tasks import BENCHMARKS
from eval.tasks.base import GRADERS
from eval.tasks.math import grade_answer
from tests.support.grader_cases import find_strict_verdict, read_grader_cases


@pytest.mark.parametrize("case", read_grader_cases("math"), ids=lambda case: f"math-{case['id']}")
def test_labelled_cases(case: dict) -> None:
    found = grade_answer(case["output"], case["reference"])
    assert found is find_strict_verdict(case), case["why"]
    if case.get("literature") in (True, False):
        by_literature = grade_answer(case["output"], case["reference"], "literature")
        assert by_literature is case.get("literature")


ANSWERS = [
    (
        r"The answer is: $\left( 3, \frac{\pi}{2} \right)$.",
        r"\left( 3, \frac{\pi}{2} \right)",
        True,
    ),
    (r"So $\boxed{5}$ at first, and in the end $\boxed{7}$.", "7", True),
    (r"So $\boxed{5}$ at first, and in the end $\boxed{7}$.", "5", False),
    (r"The final answer is \boxed{\dfrac{1}{2}}", r"\frac12", True),
    ("The answer is 4", "4", True),
    ("4", "4", True),  # nothing but a value
    ("The answer is: 2x+1", "1+2x", True),
    ("The answer is: 0.333", r"\frac{1}{3}", False),
    ("The answer is: 1,000", "1000", True),
    ("The answer is: 1,2", "2,1", True),  # solutions have no order
    ("The answer is: (1,2)", "(2,1)", False),
    (r"The answer is: 45^\circ", "45", True),
    (r"The answer is: \text{Tuesday}", r"\text{Monday}", False),
    ("The answer is:", "7", False),
    (r"The answer is: \boxed{", "7", False),
]


@pytest.mark.parametrize(("output", "reference", "expected"), ANSWERS, ids=range(len(ANSWERS)))
def test_further_answers(output: str, reference: str, expected: bool) -> None:
    assert grade_answer(output, reference) is expected


HOSTILE = [
    "__import__('os').system('touch {marker}')",
    r"9^{9^{9^{9}}}",
    "(" * 3000 + "7" + ")" * 3000,
    "x" * 100_000,
    r"\frac{" * 40,
    "\x00\ud800",
    "100000000!",
    r"\int_0^{10^{10}} \sin(x^x) dx",
    "x = " + "\u222a".join(["1"] * 500),
]


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_end_in_time_without_effect(text: str, tmp_path: Path) -> None:
    are_equivalent("x", "y")  # the worker's start, after a kill, is not measured
    # Processor time, also of the worker, which the time limit charges.
    marker, before = tmp_path / "marker", read_usage(os.getpid()).cpu
    assert grade_answer("The answer is: " + text.replace("{marker}", str(marker)), "7") is False
    assert read_usage(os.getpid()).cpu - before < 10
    assert not marker.exists()


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=40))
def test_graders_never_raise(text: str) -> None:
    for grader in GRADERS:
        assert grade_answer(f"The answer is: {text}", "7", grader) in (True, False)
        assert grade_answer(text, text, grader) in (True, False)


def test_every_gold_answer_of_math500_is_right_and_a_changed_one_wrong(shared: Path) -> None:
    problems = BENCHMARKS["math500"].read_problems(shared / "data", None)
    assert len(problems) == 500
    references = [problem.reference for problem in problems]
    for form in ("The answer is: {}", "The answer is: ${}$.", "Therefore \\boxed{{{}}}."):
        wrong = [r for r in references if not grade_answer(form.format(r), r)]
        assert wrong == []
    changed = [r for r in references if grade_answer(f"The answer is: {r} + 1", r)]
    assert changed == []
    stated = {r: f"The answer is: {r}" for r in references}
    wrong = [r for r, output in stated.items() if not grade_answer(output, r, "literature")]
    assert wrong == []


def test_every_gold_answer_of_math_is_right(benchmark_data: Path) -> None:
    problems = BENCHMARKS["math"].read_problems(benchmark_data, None)
    assert len(problems) == 1000
    references = [problem.reference for problem in problems]
    assert [r for r in references if not grade_answer(f"The answer is: {r}", r)] == []
