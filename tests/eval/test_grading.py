"""Stored responses are matched with their problems, graded by both graders and summed up.

Needs bubblewrap or user namespaces for the test of programs. A few seconds.
"""

import threading
from collections.abc import Generator, Iterable
from pathlib import Path

import pytest

from eval import grading
from eval.errors import EvalError
from eval.grading import (
    NO_ANSWER,
    Grade,
    grade_responses,
    match_problems,
    summarise_grades,
    summarise_passes,
)
from eval.sandbox import check
from eval.sandbox.box import Box
from eval.sandbox.check import Job, Verdict
from eval.tasks import BENCHMARKS
from eval.tasks.base import Problem
from tests.support.sandbox import BOXES

TESTS = {
    "entry_point": "f",
    "setup": "",
    "tests": "assert f(1) == 2",
    "prompt": "",
    "in_box": False,
}
CODE = Problem("mbpp/11", "Add one.", "def f(x):\n    return x + 1\n", TESTS)
RIGHT = "```python\ndef f(x):\n    return x + 1\n```"
ASSERTS = "```python\ndef f(x):\n    assert x\n    return x + 1\n```"


def test_answers_are_graded_by_both_graders() -> None:
    problems = [Problem("gsm8k/0", "", "1,450,000")] * 2
    outputs = ["The answer is: 1,450,000", "The answer is: 7"]
    found = list(grade_responses(BENCHMARKS["gsm8k"], problems, outputs))
    assert found == [
        {"strict": Grade(True), "literature": Grade(False)},
        {"strict": Grade(False), "literature": Grade(False)},
    ]


@pytest.mark.parametrize(
    ("benchmark", "reference", "output", "strict", "literature"),
    [
        ("gsm8k", "18", "#### 18", True, None),
        ("gsm8k", "18", "I do not know.", None, None),
        ("gsm8k", "18", "The answer is: 7", False, False),
        ("math", r"\frac{1}{2}", r"So $\boxed{\frac{1}{2}}$.", True, None),
        ("math", "2", "The answer is: 3", False, False),
        ("boolq", "true", "maybe", None, None),
        ("boolq", "true", "It is untrue.", None, True),
        ("boolq", "true", "false", False, False),
    ],
)
def test_no_answer_is_told_from_a_wrong_one(
    benchmark: str, reference: str, output: str, strict: bool | None, literature: bool | None
) -> None:
    problem = Problem(f"{benchmark}/0", "", reference)
    (found,) = grade_responses(BENCHMARKS[benchmark], [problem], [output])
    wanted = {"strict": strict, "literature": literature}
    for grader, passed in wanted.items():
        assert found[grader] == Grade(bool(passed), NO_ANSWER if passed is None else "")
    summary = summarise_grades([[found], [found]])
    for grader, of_grader in (("strict", summary), ("literature", summary["literature"])):
        assert of_grader.get("no_answer") == (2 if wanted[grader] is None else None)


def test_programs_are_run() -> None:
    if not BOXES:
        pytest.skip("neither bubblewrap nor user namespaces work on this machine")
    found = list(grade_responses(BENCHMARKS["mbpp"], [CODE] * 2, [RIGHT, ASSERTS]))
    assert [[of[grader].passed for grader in ("strict", "literature")] for of in found] == [
        [True, True],
        [True, False],  # the published rule cuts at the first assert
    ]
    assert found[0]["strict"].isolation == next(iter(BOXES))


def test_a_program_that_both_graders_extract_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Job] = []
    unused = Box("none", [])

    def check_programs(jobs: Iterable[Job], *, box: Box) -> Generator[Verdict, None, None]:
        assert box is unused
        for number, job in enumerate(jobs):
            seen.append(job)
            yield Verdict(True, f"run {number}", box.level)

    monkeypatch.setattr(grading, "check_programs", check_programs)
    outputs = ["def f(x):\n    return x + 1\n", ASSERTS, "def f(x):\n    return x + 1\n"]
    found = list(grade_responses(BENCHMARKS["mbpp"], [CODE] * 3, outputs, timeout=3, box=unused))
    assert [(job.entry_point, job.timeout) for job in seen] == [("f", 3)] * 4
    reasons = [(of["strict"].reason, of["literature"].reason) for of in found]
    assert reasons == [("run 0", "run 0"), ("run 1", "run 2"), ("run 3", "run 3")]


def test_a_grade_comes_before_the_last_program_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watchdog ends a run that shows no progress, and all programs may take hours."""
    graded = threading.Event()

    def check_program(job: Job, box: Box) -> Verdict:
        is_last = "assert x" in job.solution
        has_waited = not is_last or graded.wait(10)
        return Verdict(has_waited, "passed" if has_waited else "no grade came before", box.level)

    monkeypatch.setattr(check, "check_program", check_program)
    box = Box("none", [])
    grades = grade_responses(
        BENCHMARKS["mbpp"], [CODE] * 3, [RIGHT, RIGHT, ASSERTS], ["strict"], box=box
    )
    found = [next(grades)]
    graded.set()
    found += grades
    assert found == [{"strict": Grade(True, "passed", "none")}] * 3


def test_problems_are_matched_by_reference_or_id(tmp_path: Path) -> None:
    rows = [{"id": "a", "reference": "1"}, {"reference": "2"}]
    matched = match_problems(BENCHMARKS["gsm8k"], rows, None)
    assert [(problem.id, problem.reference) for problem in matched] == [("a", "1"), ("1", "2")]
    lines = [f'{{"question": "q{i}", "answer": "#### {i}"}}\n' for i in range(3)]
    (tmp_path / "gsm8k_test.jsonl").write_text("".join(lines))
    matched = match_problems(BENCHMARKS["gsm8k"], [{"id": "gsm8k/2"}, {"id": "gsm8k/0"}], tmp_path)
    assert [problem.question for problem in matched] == ["q2", "q0"]
    with pytest.raises(EvalError, match="response 1 has no id of a problem, such as gsm8k/0"):
        match_problems(BENCHMARKS["gsm8k"], [{"id": "gsm8k/9"}], tmp_path)


def test_a_row_of_another_question_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n')
    rows = [{"id": "gsm8k/0"}, {"id": "gsm8k/0", "question": "q"}]
    assert len(match_problems(BENCHMARKS["gsm8k"], rows, tmp_path)) == 2
    rows[1]["question"] = "of another folder"
    with pytest.raises(EvalError, match="response 2 has another question than gsm8k/0"):
        match_problems(BENCHMARKS["gsm8k"], rows, tmp_path)


def test_a_data_folder_that_is_given_is_read_where_rows_have_ids(tmp_path: Path) -> None:
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n')
    row = {"id": "gsm8k/0", "question": "q", "reference": "1"}
    assert match_problems(BENCHMARKS["gsm8k"], [row], tmp_path)[0].question == "q"
    for field in ("question", "reference"):
        with pytest.raises(EvalError, match=f"response 1 has another {field} than gsm8k/0"):
            match_problems(BENCHMARKS["gsm8k"], [row | {field: "2"}], tmp_path)
        assert match_problems(BENCHMARKS["gsm8k"], [row | {field: "2"}], None)
    both = match_problems(BENCHMARKS["gsm8k"], [row, {"reference": "2"}], tmp_path)
    assert [problem.reference for problem in both] == ["1", "2"]


def test_a_summary_counts_problems_and_samples() -> None:
    single = summarise_passes([[True], [False], [True], [True]])
    assert (single["accuracy"], single["n"], single["correct"]) == (0.75, 4, 3)
    assert "pass_at" not in single
    several = summarise_passes([[True] * 10, [False] * 9 + [True]])
    assert (several["accuracy"], several["samples"], several["correct"]) == (0.55, 10, 1)
    assert several["pass_at"] == {"1": pytest.approx(0.55), "10": 1.0}


def test_problems_with_unlike_numbers_of_samples_count_alike() -> None:
    summary = summarise_passes([[True, True, False, False], [True, True]])
    assert (summary["accuracy"], summary["n"], summary["samples"]) == (0.75, 2, 4)
    assert summary["pass_at"] == {"1": pytest.approx(0.75)}
    low, high = summary["interval"]
    assert low <= 0.75 <= high
    assert "pass_at" not in summarise_passes([[True, False], [True]])
