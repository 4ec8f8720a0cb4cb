"""The GSM8K grader is right and exact on labelled responses, and never raises on hostile ones.

Also what damaged files say. Needs the shared GSM8K for one test. About ten seconds.
"""

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.errors import EvalError
from eval.tasks.gsm8k import grade_answer, read_problems
from tests.support.grader_cases import find_strict_verdict, read_grader_cases

CASES = read_grader_cases("gsm8k")
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
    ("The answer is: 20 - 2", "18", True),  # the difference is 18, as 36/2 is
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
    "The answer is: x = " + "\u222a".join(["1"] * 500),
    "The answer is: " + "1" + ")" * 500 + "," + "(" * 490 + "1,2" + ")" * 490,
    "answer is" + " " * 50_000,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["why"])
def test_labelled_cases(case: dict) -> None:
    assert grade_answer(case["output"], case["reference"]) is find_strict_verdict(case)


def test_there_are_labelled_cases() -> None:
    assert len(CASES) >= 30


@pytest.mark.parametrize(("output", "reference", "expected"), MORE)
def test_more_forms_of_an_answer(output: str, reference: str, expected: bool) -> None:
    assert grade_answer(output, reference) is expected


@pytest.mark.parametrize("output", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_outputs_are_no_answer(output: str) -> None:
    assert grade_answer(output, "18") is False


@settings(deadline=None)
@given(st.text(max_size=60), st.sampled_from(["", "The answer is: ", "#### ", "\\boxed{"]))
def test_never_raises(text: str, before: str) -> None:
    assert grade_answer(before + text, "18") in (True, False)


@settings(deadline=None)
@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_an_integer_is_accepted_for_itself_alone(answer: int, reference: int) -> None:
    for text in (f"{answer}", f"{answer:,}", f"${answer}", f"{answer}.0", f"{answer} apples."):
        assert grade_answer(f"It is so.\nThe answer is: {text}", str(reference)) is (
            answer == reference
        )


def test_rows_keep_the_bare_answer_and_the_limit(tmp_path: Path) -> None:
    lines = [{"question": f"q{i}", "answer": f"so {i}\n#### 1,00{i}"} for i in range(3)]
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = [
        (problem.id, problem.question, problem.reference)
        for problem in read_problems(tmp_path, limit=2)
    ]
    assert found == [("gsm8k/0", "q0", "1,000"), ("gsm8k/1", "q1", "1,001")]


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
        read_problems(tmp_path)
    with pytest.raises(EvalError, match="has none of"):
        read_problems(tmp_path / "absent")


def test_the_real_test_set_grades_its_own_answers(shared: Path) -> None:
    problems = read_problems(shared / "data")
    assert len(problems) == 1319
    assert all(
        grade_answer(f"The answer is: {problem.reference}", problem.reference)
        for problem in problems
    )
    wrong = [f"The answer is: {problem.reference}1" for problem in problems]
    assert not any(
        grade_answer(output, problem.reference)
        for output, problem in zip(wrong, problems, strict=True)
    )
    # One separator is read: of the gold answers that alone fails.
    failing = [
        problem.reference
        for problem in problems
        if not grade_answer(f"The answer is: {problem.reference}", problem.reference, "literature")
    ]
    assert failing == ["1,450,000"]


# The characters of numbers: most draws reach the parser of fractions and mixed numbers.
SYNTAX = "0123456789 \t\u00a0\u2009/.,-+=eE%$()\\\\{}\u0663\u00b2\u00bd\uff11"


@settings(max_examples=150, deadline=None)
@given(
    st.text(alphabet=SYNTAX, max_size=12),
    st.sampled_from(["The answer is: ", "#### ", "", "\\boxed{"]),
)
def test_never_raises_on_what_looks_like_a_number(text: str, before: str) -> None:
    assert grade_answer(before + text, "18") in (True, False)
    assert grade_answer("The answer is: 18", text) in (True, False)


@pytest.mark.parametrize(
    "text", ["1\t1/2", "3  / 4", "3 /  4", "1  1/2", "1\u20091/2", "-\t1/2", "1.5/0.0", "3/00"]
)
def test_odd_white_space_and_zeros_in_a_fraction_do_not_raise(text: str) -> None:
    assert grade_answer(f"The answer is: {text}", "18") is False


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\u0661\u0668", True),  # Arabic-Indic
        ("\u0967\u096e", True),  # Devanagari
        ("\uff11\uff18", True),  # full width
        ("1\u2078", False),  # a superscript is an exponent, not a digit of 18
        ("\u00b9\u2078", False),
        ("\u2460\u2467", False),  # circled
        ("\u2168", False),  # a Roman numeral
    ],
)
def test_digits_of_other_scripts_are_read_and_what_is_no_digit_is_not(
    text: str, expected: bool
) -> None:
    assert grade_answer(f"The answer is: {text}", "18") is expected


@pytest.mark.parametrize("digits", [400, 401, 4300, 4301, 100_000])
def test_answers_of_hundreds_of_digits_neither_raise_nor_equal_a_short_one(digits: int) -> None:
    nines = "9" * digits
    for text in (nines, f"-{nines}", f"0.{nines}", f"1/{nines}", f"{nines}/{nines}", f"1e{nines}"):
        assert grade_answer(f"The answer is: {text}", "18") is False
    assert grade_answer("The answer is: 18", nines) is False


@pytest.mark.parametrize(
    "text",
    [
        "!" + " " * 100_000 + "x",
        " 1" * 50_000,
        "1 1/" * 25_000,
        "{" * 100_000,
        "(" * 50_000 + "18" + ")" * 50_000,
        "\\boxed{" + "{x}" * 30_000,
        "\\frac{" * 20_000,
        "answer " * 20_000,
        "-" * 100_000,
        "." * 100_000,
        "1=" * 50_000,
        "\nQuestion" + " " * 100_000 + "x",
        "\n# answer" + " " * 100_000 + "x",
        "\\boxed{1}" + "$ " * 50_000 + "x\\boxed{1}",
    ],
    ids=lambda text: text[:8].strip(),
)
@pytest.mark.parametrize("before", ["", "The answer is: "])
def test_long_outputs_are_graded_in_a_time_that_grows_with_their_length(
    text: str, before: str
) -> None:
    """Of 100,000 characters, linear work takes 0.05 s of CPU at most, quadratic work minutes."""
    start = time.process_time()
    assert grade_answer(before + text, "18") is False
    assert time.process_time() - start < 2


@settings(deadline=None)
@given(st.fractions(max_denominator=999), st.fractions(max_denominator=999))
def test_a_fraction_is_compared_exactly(answer: Fraction, reference: Fraction) -> None:
    written = f"{answer.numerator}/{answer.denominator}"
    wanted = f"{reference.numerator}/{reference.denominator}"
    if max(len(written), len(wanted)) < 300:
        assert grade_answer(f"The answer is: {written}", wanted) is (answer == reference)
        assert grade_answer(f"The answer is: {written}", written) is True


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (
            b'{"question": "q", "answer": "#### 1"}\n{"question": "\xff", "answer": "#### 1"}',
            "gsm8k_test.jsonl",
        ),
        (b'{"question": ' + b"1" * 5000 + b', "answer": "#### 1"}', "1"),
        (b"[" * 100_000, "1"),
        (b"[1]", "row 1"),
        (b'{"question": "q", "answer": "#### one"}', "row 1"),
        (b'{"question": "q", "answer": 3}', "row 1"),
        (b'\n{"question": "q", "answer": "#### 1"}', "line 1"),
    ],
    ids=[
        "not utf-8",
        "huge integer",
        "deep nesting",
        "list",
        "no number",
        "answer is a number",
        "blank line",
    ],
)
def test_a_damaged_file_is_one_line_that_names_the_place(
    content: bytes, place: str, tmp_path: Path
) -> None:
    (tmp_path / "gsm8k_test.jsonl").write_bytes(content)
    with pytest.raises(EvalError) as error:
        read_problems(tmp_path)
    assert place in str(error.value)
    assert str(error.value).startswith("gsm8k: ")
    assert "\n" not in str(error.value)
