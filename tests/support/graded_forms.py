"""Grade every form of every gold answer of a benchmark; see tests.support.answer_forms."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from eval.tasks import BENCHMARKS
from eval.tasks.base import Grader, Problem
from eval.tasks.commonsense import CHOICES
from tests.support.answer_forms import (
    Forms,
    make_label_forms,
    make_latex_forms,
    make_number_forms,
)

ANSWER_BENCHMARKS = ("gsm8k", "math", "math500", *CHOICES)


class FormCase(NamedTuple):
    """One response that was made of a gold answer."""

    problem: Problem
    output: str
    expected: bool


def make_forms(benchmark: str, problem: Problem) -> Forms:
    """Return the forms of the gold answer of `problem`."""
    if benchmark == "gsm8k":
        return make_number_forms(problem.reference, problem.id)
    if benchmark in CHOICES:
        return make_label_forms(problem.reference, CHOICES[benchmark].labels, problem.id)
    return make_latex_forms(problem.reference, problem.id)


def list_form_cases(benchmark: str, data_dir: Path, every: int = 1) -> list[FormCase]:
    """Return the forms of every `every`-th problem in `data_dir`.

    Raises:
        EvalError: there is no file of the benchmark.
    """
    cases = []
    for problem in BENCHMARKS[benchmark].read_problems(data_dir, None)[::every]:
        forms = make_forms(benchmark, problem)
        cases += [FormCase(problem, output, True) for output in forms.equivalent]
        cases += [FormCase(problem, output, False) for output in forms.different]
    return cases


def grade_cases(
    benchmark: str, cases: Sequence[FormCase], grader: Grader, threads: int = 1
) -> Iterator[bool]:
    """Yield the verdict of each case, in order. Each thread has its own worker for maths."""
    grade = BENCHMARKS[benchmark].grade
    if threads == 1:  # this thread's worker may run already
        yield from (grade(case.output, case.problem, grader) for case in cases)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda case: grade(case.output, case.problem, grader), cases)


def hash_verdicts(verdicts: Iterator[bool]) -> str:
    """Return a short hash of verdicts in order."""
    text = "".join("1" if verdict else "0" for verdict in verdicts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
