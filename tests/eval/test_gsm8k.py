"""The GSM8K grader against labelled responses, and against hostile ones: right, exact, and it never raises."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.errors import EvalError
from eval.tasks.gsm8k import Problem, grade, rows

CASES = [json.loads(line) for line in Path(__file__).with_name("gsm8k_cases.jsonl").read_text().splitlines()]
MORE = [
    ("The answer is:\n18", "18", True),
    ("#### 18", "18", True),
    ("Answer: 18", "18", True),
    ("So the final answer is $\\boxed{18}$.", "18", True),
    ("the answer is \\(18\\)", "18", True),
    ("18", "18", True),
    ("She needs 18.", "18", False),
    ("The answer is: 18 (out of 20)", "18", True),
    ("The answer is: 18-20", "18", False),
    ("The answer is: between 18 and 20", "18", False),
    ("The answer is: 18:30", "18", False),
    ("The answer is: 18 dollars and 50 cents", "18", False),
    ("The answer is: 20. Wait. The answer is: 18", "18", True),
    ("The answer is: 18. She had 20.", "18", True),
    ("The answer is: 18, because 20 - 2 = 18", "18", True),
    ("The answer is: 13.\nThe answer is", "13", True),
    ("The answer is: \\frac{36}{2}", "18", True),
    ("The answer is: 1 1/2", "1.5", True),
    ("The answer is: 2 million", "2000000", True),
    ("The answer is: - 10", "-10", True),
    ("The answer is: 1,450,00", "145000", False),
    ("The answer is: 3/00", "3", False),
    ("The answer is: 1e400", "18", False),
    ("The answer is: ١٨", "18", True),
    ("The answer is: 18 = 20 - 2", "18", True),
    ("The answer is: 20 - 2", "18", False),
    ("The answer is: x = 18 or 20", "18", False),
    ("The answer is not 18", "18", False),
    ("The answer is: 1 200", "1200", True),
    ("The answer is: 1'200", "1200", True),
    ("The answer is: 18, not 20", "18", True),
    ("The answer is: USD 18", "18", True),
    ("The answer is: eighteen (18)", "18", True),
    ("The answer is: 018.0", "18", True),
    ("The answer is: +18", "18", True),
    ("The answer is: ", "18", False),
    ("", "18", False),
]
HOSTILE = [
    "The answer is: " + "9" * 100_000,
    "The answer is: " + "(" * 100_000 + "18",
    "The answer is: " + "1," * 50_000,
    "The answer is: " * 20_000,
    "\\boxed{" * 20_000,
    "The answer is: 1e999",
    "The answer is: 1e-999",
    "The answer is: " + "1/" * 10_000 + "1",
    "The answer is: __import__('os').system('true')",
    "The answer is: ²",
    "The answer is: \x00\ud800",
    "answer is" + " " * 50_000,
]


@pytest.mark.parametrize("case", [case for case in CASES if not case.get("contested")], ids=lambda case: case["why"])
def test_labelled_cases(case: dict) -> None:
    assert grade(case["output"], case["reference"]) is case["expected"]


def test_there_are_labelled_cases() -> None:
    assert len(CASES) >= 30


@pytest.mark.parametrize(("output", "reference", "expected"), MORE)
def test_more_forms_of_an_answer(output: str, reference: str, expected: bool) -> None:
    assert grade(output, reference) is expected


@pytest.mark.parametrize("output", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_outputs_are_no_answer(output: str) -> None:
    assert grade(output, "18") is False


@given(st.text(max_size=60), st.sampled_from(["", "The answer is: ", "#### ", "\\boxed{"]))
def test_never_raises(text: str, before: str) -> None:
    assert grade(before + text, "18") in (True, False)


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_an_integer_is_accepted_for_itself_alone(answer: int, reference: int) -> None:
    for text in (f"{answer}", f"{answer:,}", f"${answer}", f"{answer}.0", f"{answer} apples."):
        assert grade(f"It is so.\nThe answer is: {text}", str(reference)) is (answer == reference)


def test_rows_keep_the_bare_answer_and_the_limit(tmp_path: Path) -> None:
    lines = [{"question": f"q{i}", "answer": f"so {i}\n#### 1,00{i}"} for i in range(3)]
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert rows(tmp_path, limit=2) == [Problem("q0", "1,000"), Problem("q1", "1,001")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "q", "answer": "#### 1"}\n{"question": "q"}', "row 2"),
        ('{"question": "q", "answer": "one"}', "row 1"),
        ('{"question": "q", "answer": "#### 1"}\n{', "line 2"),
        ("", "no problems"),
    ],
)
def test_rows_name_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "gsm8k_test.jsonl").write_text(text)
    with pytest.raises(EvalError, match=message):
        rows(tmp_path)
    with pytest.raises(EvalError, match="has none of"):
        rows(tmp_path / "absent")


def test_the_real_test_set_grades_its_own_answers(shared: Path) -> None:
    problems = rows(shared / "data")
    assert len(problems) == 1319
    assert all(grade(f"The answer is: {problem.reference}", problem.reference) for problem in problems)
