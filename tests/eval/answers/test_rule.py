"""The rule of docs/graders.md: which statement is the answer, and what equals the reference.

Needs nothing. A sample runs always, in a few seconds; all 1,000 cases in full.
"""

import time

import pytest

from eval.answers.labels import read_label
from eval.answers.read import read_answer
from eval.tasks import commonsense, gsm8k, math
from tests.support.answer_cases import (
    LABELS,
    MATHS,
    MATHS_RESPONSES,
    NUMBER_RESPONSES,
    NUMBERS,
    READINGS,
)

MARKER = "20 - 2 = 18.\nThe answer is: "


def sample(cases: list[tuple], every: int) -> list:
    """Mark all but every `every`-th case as full."""
    marked = []
    for i, case in enumerate(cases):
        marks = [pytest.mark.full] if i % every else []
        marked.append(pytest.param(*case, marks=marks, id=f"{i}"))
    return marked


@pytest.mark.parametrize(("answer", "reference", "expected"), sample(NUMBERS, 2))
def test_numbers(answer: str, reference: str, expected: bool) -> None:
    assert gsm8k.grade_answer(MARKER + answer, reference) is expected


@pytest.mark.parametrize(("output", "reference", "expected"), sample(NUMBER_RESPONSES, 1))
def test_the_statement_in_responses_to_gsm8k(output: str, reference: str, expected: bool) -> None:
    assert gsm8k.grade_answer(output, reference) is expected


@pytest.mark.parametrize(("answer", "reference", "expected"), sample(MATHS, 7))
def test_maths(answer: str, reference: str, expected: bool) -> None:
    assert math.grade_answer(MARKER + answer, reference) is expected


@pytest.mark.parametrize(("output", "reference", "expected"), sample(MATHS_RESPONSES, 6))
def test_the_statement_in_responses_to_math(output: str, reference: str, expected: bool) -> None:
    assert math.grade_answer(output, reference) is expected


@pytest.mark.parametrize(("output", "benchmark", "reference", "expected"), sample(LABELS, 1))
def test_labels(output: str, benchmark: str, reference: str, expected: bool) -> None:
    assert commonsense.grade_label(output, reference, benchmark) is expected


@pytest.mark.parametrize("run", [" ", "\n", "no, ", "("])
def test_long_runs_are_read_in_linear_time(run: str) -> None:
    started = time.perf_counter()
    read_label("answer" + run * 20_000, ("answer1", "answer2"))
    read_answer("The answer is " + run * 20_000)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.full)])
def test_readings_of_maths(every: int) -> None:
    cases = READINGS[::every]
    verdicts = [math.grade_answer(MARKER + answer, wanted) for answer, wanted, _ in cases]
    wrong = [case for case, verdict in zip(cases, verdicts, strict=True) if verdict != case[2]]
    assert wrong == []
