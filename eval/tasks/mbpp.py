"""MBPP: short Python functions to write from a sentence and its tests (Austin et al. 2021).

Two benchmarks: `mbpp` has the 500 test problems, `mbpp_sanitized` the 257 of the sanitised set's
test split. A row: {"task_id": 11, "text": "Write a function to ...", "code": ...,
"test_list": ["assert f(...) == ..."], "test_setup_code": ""}. The sanitised set has "prompt" for
"text" and "test_imports" for "test_setup_code".
"""

import ast
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from eval.errors import EvalError
from eval.tasks.base import Benchmark, CodeTests, Grader, Problem
from eval.tasks.code import extract_program, extract_program_literature
from eval.tasks.humaneval import format_wizardcoder_prompt
from eval.tasks.loading import Source, read_rows

HUB_ID = "google-research-datasets/mbpp"
SANITIZED_FILES = ("sanitized-mbpp.json", "mbpp_sanitized.jsonl")
SOURCES = {
    "mbpp": Source("mbpp", ("mbpp.jsonl", "mbpp/test.jsonl"), HUB_ID, "full", "test"),
    "mbpp_sanitized": Source("mbpp_sanitized", SANITIZED_FILES, HUB_ID, "sanitized", "test"),
}
NUM_PROBLEMS = {"mbpp": 500, "mbpp_sanitized": 257}
TEST_IDS = range(11, 511)  # a file may hold all 974 problems
# Tests that build the program's own classes or pass it a type can run only where the program runs.
IN_BOX = (367, 533, 601, 927)


def read_problems(benchmark: str, data_dir: Path | None, limit: int | None = None) -> list[Problem]:
    """Read the first `limit` test problems; see `read_all_problems`.

    Raises:
        EvalError: a row is not a problem, or none is of the test split.
    """
    problems = read_all_problems(benchmark, data_dir)
    test_problems = (p for p in problems if int(p.id.rpartition("/")[2]) in TEST_IDS)
    found = list(islice(test_problems, limit))
    if not found:
        raise EvalError(
            f"{benchmark}: {data_dir or HUB_ID} has no task_id from {TEST_IDS[0]} to "
            f"{TEST_IDS[-1]}, the test split"
        )
    return found


def read_all_problems(benchmark: str, data_dir: Path | None) -> Iterator[Problem]:
    """Yield all problems of a file, those of the other splits included.

    Raises:
        EvalError: a row is not a problem.
    """
    for number, row in enumerate(read_rows(SOURCES[benchmark], data_dir), start=1):
        text = row.get("text", row.get("prompt"))
        asserts = row.get("test_list")
        has_texts = isinstance(text, str) and isinstance(row.get("code"), str)
        if not has_texts or not asserts or "task_id" not in row:
            raise EvalError(
                f"{benchmark}: row {number} needs the fields task_id, text (or prompt), code "
                "and test_list"
            )
        task_id = _read_task_id(row, f"{benchmark}: row {number} of {data_dir or HUB_ID}")
        # Some rows have Windows line ends.
        solution = row["code"].replace("\r\n", "\n")
        setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
        examples = "\n".join(asserts)
        tests: CodeTests = {
            "entry_point": _find_entry_point(asserts, solution, benchmark, number),
            "setup": setup.replace("\r\n", "\n"),
            "tests": examples.replace("\r\n", "\n"),
            "prompt": "",
            "in_box": task_id in IN_BOX,
        }
        question = f"Create a Python script for this problem:\n{text}\nTest examples:\n{examples}"
        yield Problem(f"{benchmark}/{task_id}", question, solution, tests, text)


def _read_task_id(row: dict, place: str) -> int:
    try:
        return int(row["task_id"])
    except (ValueError, TypeError):
        raise EvalError(f"{place}: task_id {row['task_id']!r} is not a number") from None


def _find_entry_point(asserts: list[str], solution: str, benchmark: str, number: int) -> str:
    """Return the name of the first function that `asserts` call and `solution` defines."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in their strings
            program = ast.parse(solution)
            tests = [ast.parse(text) for text in asserts]
    except (SyntaxError, ValueError) as error:  # ValueError: a NUL byte
        raise EvalError(
            f"{benchmark}: row {number}: its code or tests are not Python: {error}"
        ) from None
    defined = set()
    for node in program.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
    for test in tests:
        for node in ast.walk(test):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if is_call and node.func.id in defined:
                return node.func.id
    raise EvalError(f"{benchmark}: row {number}: its tests call nothing that its code defines")


def _extract_program(output: str, problem: Problem, grader: Grader) -> str:
    if grader == "literature":
        return extract_program_literature(output)
    return extract_program(output, problem.tests["entry_point"])


def _make_benchmark(name: str) -> Benchmark:
    return Benchmark(
        name=name,
        kind="code",
        num_problems=NUM_PROBLEMS[name],
        read_problems=partial(read_problems, name),
        format_literature_prompt=format_wizardcoder_prompt,
        stops=(),
        max_new_tokens=1024,
        extract_program=_extract_program,
    )


BENCHMARKS = tuple(_make_benchmark(name) for name in SOURCES)
