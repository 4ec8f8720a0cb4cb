"""MBPP's problems are read: the test split, the sanitised set's fields, the tests in the box.

Needs the shared MBPP for one test. A second.
"""

import json
from pathlib import Path

import pytest

from eval.errors import EvalError
from eval.tasks import BENCHMARKS
from eval.tasks.mbpp import IN_BOX, read_all_problems

SOLUTION = "def f(x):\n    return x + 1\n"


def test_the_real_problems(shared: Path) -> None:
    problems = BENCHMARKS["mbpp"].read_problems(shared / "data", None)
    assert (len(problems), problems[0].id, problems[-1].id) == (500, "mbpp/11", "mbpp/510")
    everything = list(read_all_problems("mbpp", shared / "data"))
    assert len(everything) == 974
    in_box = [problem.id for problem in everything if problem.tests["in_box"]]
    assert in_box == [f"mbpp/{i}" for i in IN_BOX]


def test_a_task_id_is_a_number_also_as_text(tmp_path: Path) -> None:
    row = {"task_id": "367", "text": "", "code": SOLUTION, "test_list": ["assert f(1) == 2"]}
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(row))
    (problem,) = BENCHMARKS["mbpp"].read_problems(tmp_path, None)
    assert (problem.id, problem.tests["in_box"]) == ("mbpp/367", True)
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(row | {"task_id": "Mbpp/367"}))
    with pytest.raises(EvalError, match=r"row 1 of \S+: task_id 'Mbpp/367' is not a number"):
        BENCHMARKS["mbpp"].read_problems(tmp_path, None)


def test_a_file_of_other_splits_alone_has_no_problems(tmp_path: Path) -> None:
    row = {"task_id": 601, "text": "", "code": SOLUTION, "test_list": ["assert f(1) == 2"]}
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(row))
    with pytest.raises(EvalError, match=r"mbpp: \S+ has no task_id from 11 to 510"):
        BENCHMARKS["mbpp"].read_problems(tmp_path, None)


def test_the_sanitised_sets_fields_and_what_is_wrong(tmp_path: Path) -> None:
    row = {
        "task_id": 11,
        "prompt": "Add.",
        "code": SOLUTION,
        "test_imports": ["import math"],
        "test_list": ["assert f(1) == 2"],
    }
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps([row, row | {"task_id": 600}]))
    (problem,) = BENCHMARKS["mbpp_sanitized"].read_problems(tmp_path, None)
    assert (problem.id, problem.tests["setup"], problem.tests["entry_point"]) == (
        "mbpp_sanitized/11",
        "import math",
        "f",
    )
    assert "Add.\nTest examples:\nassert f(1) == 2" in problem.question
    (tmp_path / "sanitized-mbpp.json").write_text(
        json.dumps([row | {"test_list": ["assert g(1)"]}])
    )
    with pytest.raises(EvalError, match="row 1: its tests call nothing that its code defines"):
        BENCHMARKS["mbpp_sanitized"].read_problems(tmp_path, None)
    del row["task_id"]
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps([row]))
    with pytest.raises(EvalError, match="row 1 needs the fields task_id"):
        BENCHMARKS["mbpp_sanitized"].read_problems(tmp_path, None)
