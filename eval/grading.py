"""Grade stored responses: answers as they are, programs by running them in eval.sandbox.check."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from eval.errors import EvalError
from eval.sandbox.box import Box
from eval.sandbox.check import Job, check_programs
from eval.statistics import clustered_interval, pass_at_k
from eval.tasks.base import GRADERS, Benchmark, Grader, Problem

PASS_AT = (1, 10, 100)  # the k of pass@k
NO_ANSWER = "no answer"  # reason of a response in which a grader finds none


class Grade(NamedTuple):
    """What one grader says of one response."""

    passed: bool
    reason: str = ""  # for a program: "passed", or why not; for an answer: NO_ANSWER, or empty
    isolation: str = ""  # for a program: what it ran in, see eval.sandbox.check.Verdict


def grade_responses(
    benchmark: Benchmark,
    problems: Sequence[Problem],
    outputs: Sequence[str],
    graders: Iterable[Grader] = GRADERS,
    *,
    timeout: float = 10.0,
    box: Box | None = None,
) -> Iterator[dict[Grader, Grade]]:
    """Yield the grades of each output, in order, each as soon as it is known.

    Args:
        problems: the problem of each output.
        timeout: seconds that a program may use, see eval.sandbox.watch.
        box: what programs run in; by default what eval.sandbox.box.choose_box finds.

    Raises:
        EvalError: there are programs to run, and no box.
    """
    graders = tuple(graders)  # it is iterated once for each output
    if benchmark.kind == "code":
        yield from _grade_programs(benchmark, problems, outputs, graders, timeout, box)
        return
    for problem, output in zip(problems, outputs, strict=True):
        yield {grader: _grade_answer(benchmark, problem, output, grader) for grader in graders}


def _grade_answer(benchmark: Benchmark, problem: Problem, output: str, grader: Grader) -> Grade:
    passed = benchmark.grade(output, problem, grader)
    has_answer = passed or benchmark.finds_answer(output, grader)
    return Grade(passed, "" if has_answer else NO_ANSWER)


def _grade_programs(
    benchmark: Benchmark,
    problems: Sequence[Problem],
    outputs: Sequence[str],
    graders: Sequence[Grader],
    timeout: float,
    box: Box | None,
) -> Iterator[dict[Grader, Grade]]:
    """Yield the grades of each output. A program that several graders extract runs once."""
    programs: list[dict[Grader, str]] = []
    jobs: list[Job] = []
    for problem, output in zip(problems, outputs, strict=True):
        extracted = {
            grader: benchmark.extract_program(output, problem, grader) for grader in graders
        }
        programs.append(extracted)
        jobs += [_make_job(program, problem, timeout) for program in _drop_repeated(extracted)]
    # Each grade is handed on as soon as its programs have run: all of them may take hours, and
    # grades are the progress that the watchdog of a run waits for.
    with closing(check_programs(jobs, box=box)) as verdicts:
        for extracted in programs:
            found = {program: next(verdicts) for program in _drop_repeated(extracted)}
            yield {grader: Grade(*found[program]) for grader, program in extracted.items()}


def _drop_repeated(extracted: Mapping[Grader, str]) -> list[str]:
    """Return the programs that graders extracted from one output, each once."""
    return list(dict.fromkeys(extracted.values()))


def _make_job(program: str, problem: Problem, timeout: float) -> Job:
    tests = problem.tests
    return Job(
        program,
        tests["tests"],
        tests["entry_point"],
        setup=tests["setup"],
        in_box=tests["in_box"],
        timeout=timeout,
    )


def make_grade_fields(benchmark: Benchmark, given: Mapping[Grader, Grade]) -> dict[str, object]:
    """Return the fields of a stored response that hold its grades."""
    fields: dict[str, object] = {grader: grade.passed for grader, grade in given.items()}
    if benchmark.kind == "code":
        # Why the program failed, and what isolated it.
        fields |= {"reason": given["strict"].reason, "isolation": given["strict"].isolation}
    return fields


def match_problems(
    benchmark: Benchmark, rows: Sequence[dict], data_dir: Path | None
) -> list[Problem]:
    """Return the problem that each stored response answers.

    The problem of an answer is made from the row's `reference`, unless `data_dir` is given and the row
    has an `id`. All other problems are read, and found by the row's `id`.

    Raises:
        EvalError: a row has neither, or the benchmark does not have its id, or has another question
            or reference under it than the row.
    """
    known: dict[str, Problem] = {}
    matched = []
    for number, row in enumerate(rows, start=1):
        has_reference = benchmark.kind == "answer" and isinstance(row.get("reference"), str)
        if has_reference and (data_dir is None or row.get("id") is None):
            matched.append(Problem(str(row.get("id", number - 1)), "", row["reference"]))
            continue
        if not known:
            known = {problem.id: problem for problem in benchmark.read_problems(data_dir, None)}
        matched.append(_look_up(benchmark, known, row, number))
    return matched


def _look_up(benchmark: Benchmark, known: Mapping[str, Problem], row: dict, number: int) -> Problem:
    """Return the problem of `known` that a row has the id of. Raises EvalError (match_problems)."""
    if row.get("id") not in known:
        raise EvalError(
            f"{benchmark.name}: response {number} has no id of a problem, such as {next(iter(known))}"
        )
    problem = known[row["id"]]
    for field in ("question", "reference"):
        if row.get(field) not in (None, getattr(problem, field)):
            raise EvalError(
                f"{benchmark.name}: response {number} has another {field} than {problem.id} of "
                "the data folder; give the one that it was made with"
            )
    return problem


def summarise_grades(by_problem: Sequence[Sequence[Mapping[Grader, Grade]]]) -> dict:
    """Compute the score of one benchmark: the strict grader's, with `literature` in it.

    Each has what `summarise_passes` returns and, above 0, `no_answer`: the responses in which the
    grader finds no answer, which count as wrong.

    Args:
        by_problem: for each problem, the grades of each of its samples.
    """
    totals = {}
    for grader in GRADERS:
        passed = [[given[grader].passed for given in of_problem] for of_problem in by_problem]
        totals[grader] = summarise_passes(passed)
        reasons = [given[grader].reason for of_problem in by_problem for given in of_problem]
        if NO_ANSWER in reasons:
            totals[grader]["no_answer"] = reasons.count(NO_ANSWER)
    return totals["strict"] | {"literature": totals["literature"]}


def summarise_passes(passed: Sequence[Sequence[bool]]) -> dict:
    """Compute the score of one benchmark by one grader.

    Args:
        passed: for each problem, whether each of its samples passed; at least one sample for each.

    Returns:
        accuracy (mean over problems of the share of their samples that passed, a fraction), n
        (problems), samples (the most of a problem), correct (first samples that passed), interval
        (95 % interval of the accuracy, see eval.statistics.clustered_interval) and, if every
        problem has several samples, pass_at: the mean pass@k of every k in `PASS_AT` up to the
        number of samples.
    """
    n, samples = len(passed), max(map(len, passed))
    num_passed = [sum(of_problem) for of_problem in passed]
    counts = [len(of_problem) for of_problem in passed]
    shares = [count / total for count, total in zip(num_passed, counts, strict=True)]
    # One division where the counts are equal, so that equal scores are equal to the last bit.
    is_even = min(counts) == samples
    summary = {
        "accuracy": sum(num_passed) / (n * samples) if is_even else math.fsum(shares) / n,
        "n": n,
        "samples": samples,
        "correct": sum(of_problem[0] for of_problem in passed),
        "interval": list(clustered_interval(shares, counts)),
    }
    if min(counts) > 1:
        summary["pass_at"] = {}
        for k in PASS_AT:
            if k <= min(counts):
                values = [pass_at_k(c, p, k) for c, p in zip(counts, num_passed, strict=True)]
                summary["pass_at"][str(k)] = sum(values) / n
    return summary
