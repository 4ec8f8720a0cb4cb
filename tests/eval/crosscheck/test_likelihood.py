"""The commonsense questions are asked as lm-eval asks them.

Needs the shared commonsense rows for one test. A second.
"""

from pathlib import Path

import pytest

from eval.crosscheck import likelihood
from eval.errors import EvalError
from eval.tasks import BENCHMARKS
from eval.tasks.base import Problem
from eval.tasks.commonsense import CHOICES

# Rows of the hub, and lm-eval's own prompt, choices and gold index for them.
ROWS = {
    "boolq": (
        {"question": "is ice cold", "answer": False},
        "Question: is ice cold?\nAnswer:",
        ["no", "yes"],
        0,
    ),
    "piqa": (
        {"goal": "Open: a jar", "sol1": "Turn it.", "sol2": "Wait.", "label": 1},
        "Question: Open: a jar\nAnswer:",
        ["Turn it.", "Wait."],
        1,
    ),
    "siqa": (
        {
            "context": "Al ran.",
            "question": "Why?",
            "answerA": "a",
            "answerB": "b c",
            "answerC": "d",
            "label": "2",
        },
        "Q: Al ran. Why?\nA:",
        ["a", "b c", "d"],
        1,
    ),
    "hellaswag": (
        {
            "activity_label": "Cake",
            "ctx": "Bake [step] it [title] a",
            "endings": ["x [a] y", "z", "v", "w"],
            "label": 3,
        },
        "Cake: Bake it. a",
        ["x y", "z", "v", "w"],
        3,
    ),
    "arc_easy": (
        {
            "question": "Why: so?",
            "choices": {"text": ["p", "q"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        "Question: Why: so?\nAnswer:",
        ["p", "q"],
        0,
    ),
    "openbookqa": (
        {
            "question_stem": "Birds",
            "choices": {"text": ["fly", "swim"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        "Birds",
        ["fly", "swim"],
        1,
    ),
}


@pytest.mark.parametrize("benchmark", ROWS)
def test_choices_are_asked_as_lm_eval_asks_them(benchmark: str) -> None:
    row, query, choices, gold = ROWS[benchmark]
    problem = Problem(f"{benchmark}/0", *CHOICES[benchmark].format_row(row))
    document = likelihood.make_document(benchmark, problem)
    assert document == {"query": query, "choices": choices, "gold": gold}


def test_winogrande_compares_the_beginnings() -> None:
    row = {
        "sentence": "The cup fits the box as the _ is big.",
        "option1": "cup",
        "option2": "box",
        "answer": "2",
    }
    problem = Problem("winogrande/0", *CHOICES["winogrande"].format_row(row))
    found = likelihood.make_document("winogrande", problem)
    beginnings = ["The cup fits the box as the cup", "The cup fits the box as the box"]
    assert found == {"choices": beginnings, "suffix": "is big.", "gold": 1}


def test_a_question_without_its_choices_is_named() -> None:
    problem = Problem("piqa/7", "Please choose: what?\n\nAnswer format: a/b", "solution1")
    with pytest.raises(EvalError, match="piqa/7"):
        likelihood.make_document("piqa", problem)


def test_every_real_question_lists_its_choices(shared: Path) -> None:
    for benchmark in likelihood.VIEWS:
        for problem in BENCHMARKS[benchmark].read_problems(shared / "data", None):
            found = likelihood.make_document(benchmark, problem)
            assert all(found["choices"])
            gold = found["choices"][found["gold"]]
            assert benchmark == "boolq" or gold.split()[-1] in problem.question
