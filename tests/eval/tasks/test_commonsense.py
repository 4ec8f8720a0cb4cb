"""Both graders of the commonsense benchmarks, and the instructions made from the hub's rows.

Needs the shared commonsense rows for the gold labels. A few seconds.
"""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.errors import EvalError
from eval.tasks import BENCHMARKS
from eval.tasks.base import GRADERS
from eval.tasks.commonsense import CHOICES, grade_label
from tests.support.grader_cases import find_strict_verdict, read_grader_cases

CASES = read_grader_cases(*CHOICES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['bench']}-{case['id']}")
def test_labelled_cases(case: dict) -> None:
    output, reference, name = case["output"], case["reference"], case["bench"]
    found = grade_label(output, reference, name)
    assert found is find_strict_verdict(case), case["why"]
    if case.get("literature") in (True, False):
        assert grade_label(output, reference, name, "literature") is case.get("literature")


@pytest.mark.parametrize("name", ["siqa", "arc_challenge", "openbookqa"])
def test_the_published_rule_knows_five_answers_of_three_benchmarks(name: str) -> None:
    assert grade_label("answer5, no: answer1", "answer1", name, "literature") is False
    assert grade_label("answer6, no: answer1", "answer1", name, "literature") is True


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=40))
def test_graders_never_raise(text: str) -> None:
    for grader in GRADERS:
        assert grade_label(text, "true", "boolq", grader) in (True, False)


@pytest.mark.parametrize(
    "text",
    [
        "true " * 20_000,
        "answer is " + "a.m. " * 20_000,
        "answer is (" + "; " * 50_000,
        "answer is " + "!" * 100_000,
        "answer is " + ". " * 50_000,
        "\nQuestion" + " " * 100_000 + "x",
    ],
    ids=lambda text: text[:12].strip(),
)
def test_long_responses_are_graded_in_a_time_that_grows_with_their_length(text: str) -> None:
    """Linear work takes 0.2 s of CPU at most, quadratic work minutes."""
    start = time.process_time()
    assert grade_label(text, "false", "boolq") is False
    assert time.process_time() - start < 3


@pytest.mark.parametrize("name", CHOICES)
def test_every_gold_label_is_right_and_another_wrong(name: str, shared: Path) -> None:
    problems = BENCHMARKS[name].read_problems(shared / "data", None)
    assert len(problems) == 200
    for problem in problems:
        for grader in GRADERS:
            for label in CHOICES[name].labels:
                output = f"the correct answer is {label}"
                passed = grade_label(output, problem.reference, name, grader)
                assert passed is (label == problem.reference)


def test_the_hubs_rows_become_the_published_instructions(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "hellaswag").mkdir()
    raw = (shared / "data" / "hellaswag_val_raw_1000.jsonl").read_text()
    (tmp_path / "hellaswag" / "test.jsonl").write_text(raw)
    made = {
        (p.question, p.reference) for p in BENCHMARKS["hellaswag"].read_problems(tmp_path, None)
    }
    published = [
        (p.question, p.reference)
        for p in BENCHMARKS["hellaswag"].read_problems(shared / "data", None)
    ]
    assert all(pair in made for pair in published)


RAW = {
    "boolq": (
        {"question": "is it so", "answer": True, "passage": "p"},
        "Please answer the following question with true or false, question: is it so?\n\nAnswer format: true/false",
        "true",
    ),
    "piqa": (
        {"goal": "To do it.", "sol1": "a", "sol2": "b", "label": 1},
        "Please choose the correct solution to the question: To do it.\n\nSolution1: a\n\nSolution2: b\n\n"
        "Answer format: solution1/solution2",
        "solution2",
    ),
    "siqa": (
        {
            "context": "C.",
            "question": "Q?",
            "answerA": "a",
            "answerB": "b",
            "answerC": "c",
            "label": "3",
        },
        "Please choose the correct answer to the question: C. Q?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
    ),
    "winogrande": (
        {"sentence": "The _ is.", "option1": "a", "option2": "b", "answer": "2"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: The _ is.\n\n"
        "Option1: a Option2: b Answer format: option1/option2",
        "option2",
    ),
    "arc_easy": (
        {
            "question": "Q?",
            "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        "Please choose the correct answer to the question: Q?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer2",
    ),
    "openbookqa": (
        {
            "question_stem": "Q",
            "choices": {"text": ["a", "b"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        "Please choose the correct answer to the question: Q\n\nAnswer1: a Answer2: b\n\n"
        "Answer format: answer1/answer2",
        "answer1",
    ),
}


@pytest.mark.parametrize("name", RAW)
def test_the_hubs_own_fields(name: str, tmp_path: Path) -> None:
    row, instruction, reference = RAW[name]
    (tmp_path / name).mkdir()
    (tmp_path / name / "test.json").write_text(json.dumps([row]))
    (problem,) = BENCHMARKS[name].read_problems(tmp_path, None)
    assert (problem.question, problem.reference) == (instruction, reference)
    (tmp_path / name / "test.json").write_text(json.dumps([{"foo": 1}]))
    with pytest.raises(EvalError, match="row 1 has neither"):
        BENCHMARKS[name].read_problems(tmp_path, None)
