"""Grade stored responses again, by both graders. Needs no model."""

import json
from collections.abc import Sequence
from pathlib import Path

from eval import grading
from eval.sandbox.box import choose_box
from eval.tasks import BENCHMARKS
from eval.tasks.base import GRADERS, Grader
from launch.run.results import Score
from launch.runtime.errors import UserError
from launch.scoring.responses import check_responses, read_generations

GRADED = "graded.jsonl"


def regrade_responses(
    path: Path,
    output: Path,
    data_dir: Path | None,
    timeout: float,
    allow_unsandboxed: bool,
) -> dict[str, Score]:
    """Grade the rows of a file, and write them with their grades to `output`/graded.jsonl.

    Args:
        path: JSONL rows with suite, output, and reference (of an answer) or id (of a problem).
        output: folder; it is made if need be.
        data_dir: folder with the benchmarks' files, where rows have ids; None for the hub.
        timeout: seconds that a program may take with its tests.
        allow_unsandboxed: run programs even where nothing here can isolate them.

    Returns:
        Name of the benchmark -> its score, in the order in which the file names them.

    Raises:
        UserError: the file or a row of it cannot be read.
        EvalError: a row's problem is not in the benchmark, or programs cannot be isolated.
    """
    rows = _read_rows(path)
    scores: dict[str, Score] = {}
    graded: list[dict] = []
    for name in dict.fromkeys(row["suite"] for row in rows):
        benchmark = BENCHMARKS[name]
        of_benchmark = [row for row in rows if row["suite"] == name]
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
            passed = {grader: grade.passed for grader, grade in given.items()}
            # Answers are right or wrong; of a program, why it failed.
            reason = {"reason": given["strict"].reason} if benchmark.kind == "code" else {}
            graded.append(row | passed | reason)
        scores[name] = _summarise_grades(grades)
    output.mkdir(parents=True, exist_ok=True)
    (output / GRADED).write_text("".join(json.dumps(row) + "\n" for row in graded))
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


def _summarise_grades(grades: Sequence[dict[Grader, grading.Grade]]) -> Score:
    """Sum up the grades of one benchmark. Every row counts as a problem of its own."""
    totals = {
        grader: grading.summarise_passes([[given[grader].passed] for given in grades])
        for grader in GRADERS
    }
    # The prompt that the responses were made with is not known.
    return Score(**totals["strict"], literature=totals["literature"], prompt="")
