"""Grades of stored responses. Answers are graded as they are; programs run in eval.sandbox.check."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from eval.errors import EvalError
from eval.sandbox import check as sandbox
from eval.statistics import pass_at_k, wilson
from eval.tasks.base import GRADERS, Grader, Problem, Suite


class Grade(NamedTuple):
    """One response's grade by one grader."""

    passed: bool
    reason: str = ""  # of a program
    isolation: str = ""  # of a program: what boxed it in


def grade(
    suite: Suite,
    problems: Sequence[Problem],
    outputs: Sequence[str],
    graders: Iterable[Grader] = GRADERS,
    *,
    timeout: float = 10.0,
    allow_unsandboxed: bool = False,
) -> Iterator[dict[Grader, Grade]]:
    """Grades of each output, of the problem at the same place, in order.

    Args:
        timeout: seconds that a program may take with its tests.
        allow_unsandboxed: run programs also where nothing can box them in.

    Raises:
        EvalError: programs are to be run, nothing can box them in, and that is not allowed.
    """
    graders = tuple(graders)
    if suite.kind == "answer":
        for problem, output in zip(problems, outputs, strict=True):
            yield {grader: Grade(suite.grade(output, problem, grader)) for grader in graders}
        return
    # The same program by both rules runs once.
    programs = [
        {grader: suite.to_program(output, problem, grader) for grader in graders}
        for problem, output in zip(problems, outputs, strict=True)
    ]
    distinct = [list(dict.fromkeys(of_output.values())) for of_output in programs]
    jobs = [
        sandbox.Job(program, *_tests(problem), timeout=timeout)
        for problem, texts in zip(problems, distinct, strict=True)
        for program in texts
    ]
    verdicts = iter(sandbox.check_many(jobs, allow_unsandboxed=allow_unsandboxed))
    for of_output, texts in zip(programs, distinct, strict=True):
        found = {text: Grade(*next(verdicts)) for text in texts}
        yield {grader: found[text] for grader, text in of_output.items()}


def problems_of(suite: Suite, rows: Sequence[dict], data_dir: Path | None) -> list[Problem]:
    """The problems that stored responses answer: of answers from their `reference`, of code by their `id`.

    Raises:
        EvalError: a row has neither, or its id is not in the benchmark.
    """
    if suite.kind == "answer" and all(isinstance(row.get("reference"), str) for row in rows):
        return [Problem(str(row.get("id", i)), "", row["reference"]) for i, row in enumerate(rows)]
    known = {problem.id: problem for problem in suite.rows(data_dir, None)}
    for number, row in enumerate(rows, start=1):
        if row.get("id") not in known:
            raise EvalError(
                f"{suite.name}: response {number} has no id of a problem, such as {next(iter(known))}"
            )
    return [known[row["id"]] for row in rows]


def _tests(problem: Problem) -> tuple[str, str, str, bool]:
    of = problem.tests
    return of["tests"], of["entry_point"], of["setup"], of["in_box"]


def summary(passed: Sequence[Sequence[bool]], ks: Iterable[int] = (1, 10, 100)) -> dict:
    """The score of one suite by one grader.

    Args:
        passed: for each problem, whether each of its samples passed; as many samples for each.

    Returns:
        accuracy (mean over samples, fraction), n (problems), samples, correct (first samples that passed), interval
        (95 % Wilson of the first samples), and pass@k for each k up to the samples, where there are several.
    """
    n, samples = len(passed), len(passed[0])
    first = sum(of_problem[0] for of_problem in passed)
    found = {
        "accuracy": sum(map(sum, passed)) / (n * samples),
        "n": n,
        "samples": samples,
        "correct": first,
        "interval": list(wilson(first, n)),
    }
    if samples > 1:
        estimates = {
            k: [pass_at_k(samples, sum(of), k) for of in passed] for k in ks if k <= samples
        }
        found["pass_at"] = {str(k): sum(values) / n for k, values in estimates.items()}
    return found
