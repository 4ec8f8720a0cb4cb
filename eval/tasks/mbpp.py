"""MBPP: short Python functions from a sentence and its tests (Austin et al. 2021): the 500 test problems, or the 257 of
the sanitised set's test split, which is a suite of its own, mbpp_sanitized.

A row: {"task_id": 11, "text": "Write a function to ...", "code": ..., "test_list": ["assert f(...) == ..."],
"test_setup_code": ""}; sanitised: "prompt" for "text", "test_imports" for "test_setup_code".
"""

import ast
import warnings
from functools import partial
from itertools import islice
from pathlib import Path

from eval.errors import EvalError
from eval.tasks import code as program
from eval.tasks.base import ALPACA, Grader, Problem, Suite
from eval.tasks.loading import Source, read

HUB = "google-research-datasets/mbpp"
SOURCES = {
    "mbpp": Source("mbpp", ("mbpp.jsonl", "mbpp/test.jsonl"), HUB, "full", "test"),
    "mbpp_sanitized": Source(
        "mbpp_sanitized", ("sanitized-mbpp.json", "mbpp_sanitized.jsonl"), HUB, "sanitized", "test"
    ),
}
TEST_IDS = range(11, 511)  # a file may hold all 974
# Tests that use classes of the program, or hand it a type: they can only run where the program does.
IN_BOX = (367, 533, 601, 927)


def rows(suite: str, data_dir: Path | None, limit: int | None = None) -> list[Problem]:
    """The first `limit` test problems. Raises EvalError for a row that is not one."""
    return list(
        islice(
            (p for p in everything(suite, data_dir) if int(p.id.rpartition("/")[2]) in TEST_IDS),
            limit,
        )
    )


def everything(suite: str, data_dir: Path | None):  # noqa: ANN201 (an iterator of Problem)
    """All problems of a file, those of other splits too."""
    for number, row in enumerate(read(SOURCES[suite], data_dir), start=1):
        text = row.get("text", row.get("prompt"))
        tests = row.get("test_list")
        if not isinstance(text, str) or not isinstance(row.get("code"), str) or not tests:
            raise EvalError(
                f"{suite}: row {number} needs the fields task_id, text (or prompt), code and test_list"
            )
        solution = row["code"].replace("\r\n", "\n")
        setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
        code = {
            "entry_point": _called(tests, solution, suite, number),
            "setup": setup.replace("\r\n", "\n"),
            "tests": "\n".join(tests).replace("\r\n", "\n"),
            "prompt": "",
            "in_box": row["task_id"] in IN_BOX,
        }
        examples = "\n".join(tests)
        question = f"Create a Python script for this problem:\n{text}\nTest examples:\n{examples}"
        yield Problem(f"{suite}/{row['task_id']}", question, solution, code, text)


def _called(tests: list[str], solution: str, suite: str, number: int) -> str:
    """The function of the solution that the tests call."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in their strings
            program, asserts = ast.parse(solution), [ast.parse(test) for test in tests]
        defined = {
            node.name for node in program.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        calls = [node for tree in asserts for node in ast.walk(tree) if isinstance(node, ast.Call)]
        called = [node.func.id for node in calls if isinstance(node.func, ast.Name)]
    except SyntaxError as error:
        raise EvalError(
            f"{suite}: row {number}: its code or tests are not Python: {error}"
        ) from None
    names = [name for name in called if name in defined]
    if not names:
        raise EvalError(f"{suite}: row {number}: its tests call nothing that its code defines")
    return names[0]


def to_program(output: str, problem: Problem, protocol: Grader) -> str:
    """The program in `output` that is run."""
    return (
        program.literature(output)
        if protocol == "literature"
        else program.strict(output, problem.tests["entry_point"])
    )


def _suite(name: str) -> Suite:
    return Suite(
        name=name,
        kind="code",
        rows=partial(rows, name),
        literature_prompt=lambda question: ALPACA.format(instruction=question),  # WizardCoder's
        stops=(),
        max_new_tokens=1024,
        to_program=to_program,
    )


SUITES = [_suite(name) for name in SOURCES]
