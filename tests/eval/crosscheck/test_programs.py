"""evalplus' check of programs: the inputs it gets, and, where it is installed, evalplus in the box.

Needs nothing for the inputs. With evalplus (requirements-crosscheck.txt), bubblewrap and the shared
HumanEval it judges programs; ten seconds then.
"""

import importlib.util
from pathlib import Path

import pytest

from eval.crosscheck.evalplus_box import record_calls
from eval.crosscheck.programs import check_with_evalplus
from eval.tasks.humaneval import read_problems

needs_evalplus = pytest.mark.skipif(
    importlib.util.find_spec("evalplus") is None,
    reason="evalplus is not installed: pip install --no-deps -r requirements-crosscheck.txt",
)


def test_the_calls_of_the_tests_are_recorded_and_the_references_own_are_not() -> None:
    job = {
        "reference": "def f(n, found=None):\n    return [0] if n == 0 else [*f(n - 1), n]\n",
        "entry_point": "f",
        "setup": "def twice(n):\n    return 2 * n\n",
        "tests": "value = f(twice(1))\nvalue.append(9)\nassert f(0) == [0]\n",
    }
    assert [(given, value) for given, value, _ in record_calls(job)] == [
        ((2,), [0, 1, 2]),
        ((0,), [0]),
    ]


@needs_evalplus
def test_evalplus_in_the_box_passes_references_and_fails_a_mutant(shared: Path) -> None:
    problems = read_problems(shared / "data", 3)
    references = [problem.reference for problem in problems]
    assert check_with_evalplus("humaneval", problems, references) == [True] * 3
    mutants = [
        f"def {problem.tests['entry_point']}(*_):\n    return None\n" for problem in problems
    ]
    assert check_with_evalplus("humaneval", problems, mutants) == [False] * 3
