"""Grade stored responses again, by both graders. Needs no model."""

from collections.abc import Sequence
from pathlib import Path

from eval import grading
from eval.sandbox.box import choose_box
from eval.tasks import BENCHMARKS
from eval.tasks.base import Grader
from launch.run.results import Score
from launch.runtime.errors import UserError
from launch.scoring.responses import (
    check_responses,
    count_cut_responses,
    read_generations,
    read_response,
    write_rows,
)

GRADED = "graded.jsonl"


def regrade_responses(
    path: Path,
    output: Path,
    data_dir: Path | None,
    timeout: float,
    allow_unsandboxed: bool,
) -> dict[str, Score]:
    """Grade the rows of a file, and write them with their grades to `output`/graded.jsonl.

    Rows with one id are samples of one problem, in the order of `sample`.

    Args:
        path: JSONL rows with suite, output, and reference (of an answer) or id (of a problem).
        output: folder; it is made if need be.
        data_dir: folder with the benchmarks' files, against which rows with ids are checked; with
            None answers are graded by their `reference`, and other problems come from the hub.
        timeout: seconds that a program may use, see eval.sandbox.watch.
        allow_unsandboxed: run programs even where nothing here can isolate them.

    Returns:
        Name of the benchmark -> its score, in the order in which the file names them.

    Raises:
        UserError: the file or a row of it cannot be read, or a sample is there twice.
        EvalError: a row's problem is not in the benchmark, or programs cannot be isolated.
    """
    rows = _read_rows(path)
    scores: dict[str, Score] = {}
    graded: list[dict] = []
    for name in dict.fromkeys(row["suite"] for row in rows):
        benchmark = BENCHMARKS[name]
        of_benchmark = [row for row in rows if row["suite"] == name]
        samples = _group_samples(of_benchmark, path)
        problems = grading.match_problems(benchmark, of_benchmark, data_dir)
        outputs = [row["output"] for row in of_benchmark]
        grades = list(
            grading.grade_responses(
                benchmark,
                problems,
                outputs,
                timeout=timeout,
                box=choose_box(allow_unsandboxed) if benchmark.kind == "code" else None,
            )
        )
        for row, given in zip(of_benchmark, grades, strict=True):
            graded.append(row | grading.make_grade_fields(benchmark, given))
        scores[name] = _summarise_grades(of_benchmark, grades, samples)
    output.mkdir(parents=True, exist_ok=True)
    write_rows(output / GRADED, graded)
    return scores


def _read_rows(path: Path) -> list[dict]:
    """Read the responses to grade: all of them, so a file that may be cut short is refused."""
    if not path.is_file():
        raise UserError(f"--grade: no file {path}")
    if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        raise UserError(
            f"--grade: the last line of {path} has no end; it may be cut short: complete or "
            "remove it"
        )
    rows = read_generations(path)
    if not rows:
        raise UserError(f"--grade: {path} has no rows")
    check_responses(rows, path, "--grade")
    return rows


def _group_samples(rows: Sequence[dict], path: Path) -> list[list[int]]:
    """Return for each problem the indices of its rows, by their number of the sample.

    A row without an id is a problem of its own.

    Raises:
        UserError: a sample of a problem is there twice, which would count it twice.
    """
    by_problem: dict[tuple, dict[int, int]] = {}
    for index, row in enumerate(rows):
        problem = ("row", index) if _read_id(row) is None else ("id", _read_id(row))
        samples = by_problem.setdefault(problem, {})
        sample = row.get("sample", len(samples))
        if not isinstance(sample, int) or sample in samples:
            raise UserError(
                f"--grade: {path} has sample {sample} of {row.get('id')} of {row['suite']} twice, "
                "or it is no number; remove the rows that were appended"
            )
        samples[sample] = index
    numbers = {len(samples) for samples in by_problem.values()}
    if len(numbers) > 1:
        print(
            f"{rows[0]['suite']}: the problems of {path} have {min(numbers)} to {max(numbers)} "
            "responses; each problem counts alike",
            flush=True,
        )
    return [[samples[sample] for sample in sorted(samples)] for samples in by_problem.values()]


def _summarise_grades(
    rows: Sequence[dict],
    grades: Sequence[dict[Grader, grading.Grade]],
    samples: Sequence[Sequence[int]],
) -> Score:
    """Sum up the grades of one benchmark.

    Args:
        samples: for each problem, the indices of its rows.
    """
    by_problem = [[grades[index] for index in of_problem] for of_problem in samples]
    counted = count_cut_responses((_read_id(row), read_response(row)) for row in rows)
    # The prompt that the responses were made with is not known.
    return Score(**grading.summarise_grades(by_problem), prompt="", **counted)


def _read_id(row: dict) -> str | None:
    return None if row.get("id") is None else str(row["id"])
