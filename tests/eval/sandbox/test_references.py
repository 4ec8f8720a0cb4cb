"""The references of HumanEval and MBPP pass in the sandbox, and functions that return None do not.

Needs Linux with bubblewrap or user namespaces, and the shared HumanEval and MBPP. About a minute on
two processors.
"""

import ast
import json
import random
import time
from pathlib import Path

import pytest

from eval.sandbox.box import Box
from eval.sandbox.check import Job, Verdict, check_programs

pytestmark = pytest.mark.xdist_group("sandbox")  # they look for processes that stayed behind

# MBPP tests that build the solution's own classes or pass a type: they cannot run outside the box.
IN_BOX = {367, 533, 601, 927}
SETUP = {596: "import sys"}  # its test uses a module that only its reference imports


def read_rows(shared: Path, name: str) -> list[dict]:
    path = shared / "data" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_humaneval_job(row: dict) -> Job:
    """Return the job of a HumanEval row with its reference."""
    tests = f"{row['test']}\ncheck({row['entry_point']})\n"
    solution = row["prompt"] + row["canonical_solution"]
    return Job(solution, tests, row["entry_point"], setup=row["prompt"] + "    pass\n")


def make_mbpp_job(row: dict) -> Job:
    """Return the job of an MBPP row with its reference.

    The entry point is what the first assert calls of the reference's functions.
    """
    nodes = ast.walk(ast.parse(row["code"]))
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    called = []
    for node in ast.walk(ast.parse(row["test_list"][0])):
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if is_call and node.func.id in defined:
            called.append(node.func.id)
    return Job(
        row["code"],
        "\n".join(row["test_list"]),
        called[0],
        setup=SETUP.get(row["task_id"], row["test_setup_code"]),
        in_box=row["task_id"] in IN_BOX,
    )


def return_none(job: Job) -> Job:
    """Return the job with a function that returns None in the place of its own."""
    replacement = f"def {job.entry_point}(*arguments, **keywords):\n    return None\n"
    return job._replace(solution=f"{job.solution}\n\n{replacement}")


def find_failures(ids: list, verdicts: list[Verdict]) -> dict:
    """Return the verdict of each program that failed."""
    pairs = zip(ids, verdicts, strict=True)
    return {name: verdict for name, verdict in pairs if not verdict.passed}


def find_passes(ids: list, verdicts: list[Verdict]) -> list:
    """Return the ids of the programs that passed."""
    return [name for name, verdict in zip(ids, verdicts, strict=True) if verdict.passed]


@pytest.mark.slow
def test_humaneval_references(shared: Path, box: Box) -> None:
    tasks = read_rows(shared, "humaneval.jsonl")
    began = time.monotonic()
    right = list(check_programs([make_humaneval_job(row) for row in tasks], box=box))
    seconds = time.monotonic() - began
    print(
        f"HumanEval in {box.level}: {sum(v.passed for v in right)}/{len(right)} in {seconds:.1f} s"
    )
    assert find_failures([row["task_id"] for row in tasks], right) == {}
    assert len(tasks) == 164


@pytest.mark.slow
def test_humaneval_with_none(shared: Path, any_box: None) -> None:
    tasks = read_rows(shared, "humaneval.jsonl")
    wrong = check_programs([return_none(make_humaneval_job(row)) for row in tasks])
    assert find_passes([row["task_id"] for row in tasks], wrong) == []


# HumanEval's references take the same way through the same boxes in `make test`.
@pytest.mark.full
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_mbpp_references(shared: Path, any_box: None) -> None:
    tasks = read_rows(shared, "mbpp.jsonl")
    ids = [row["task_id"] for row in tasks]
    jobs = [make_mbpp_job(row) for row in tasks]
    began = time.monotonic()
    right = list(check_programs(jobs))
    print(f"MBPP: {sum(v.passed for v in right)}/{len(right)} in {time.monotonic() - began:.1f} s")
    assert find_failures(ids, right) == {}
    some = sorted(random.Random(0).sample(range(len(tasks)), 100))
    wrong = check_programs([return_none(jobs[index]) for index in some])
    assert find_passes([ids[index] for index in some], wrong) == []
    assert len(tasks) == 974
