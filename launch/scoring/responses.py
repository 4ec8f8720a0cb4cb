"""generations.jsonl: the responses of an evaluation, appended as they come, graded at the end.

Each line is a JSON object: suite, id (of the problem), sample (from 0) and output (the response);
once graded also question, reference, a boolean for each grader and, of a program, reason and
isolation.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from eval.tasks import BENCHMARKS
from launch.runtime.errors import UserError
from launch.runtime.files import write_json, write_text

GENERATIONS = "generations.jsonl"
SETTINGS = "generation.json"  # what the responses in GENERATIONS depend on
PREVIOUS = "generations.previous.jsonl"

ResponseKey = tuple[str, str, int]
"""Names one response: benchmark, id of the problem, number of the sample."""


def open_responses(folder: Path, made_with: dict) -> dict[ResponseKey, str]:
    """Open `folder` for responses, and read those that an earlier start left there.

    Responses that were made with something else than `made_with` are set aside, in PREVIOUS.

    Args:
        made_with: all that responses depend on, as JSON values: model, adapter, decoding.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, note = folder / GENERATIONS, folder / SETTINGS
    if path.is_file() and not _was_made_with(note, made_with):
        path.replace(folder / PREVIOUS)
        print(f"{path} was made with other settings, and is {PREVIOUS} now", flush=True)
    write_json(note, made_with)
    rows = read_generations(path) if path.is_file() else []
    # Written again without a last line that a kill cut short, which the next append would continue.
    _write_rows(path, rows)
    return {(row["suite"], row["id"], row["sample"]): row["output"] for row in rows}


def _was_made_with(note: Path, made_with: dict) -> bool:
    if not note.is_file():
        return False
    as_written = json.loads(json.dumps(made_with))  # a tuple, say, is read back as a list
    return json.loads(note.read_text(encoding="utf-8")) == as_written


def append_responses(folder: Path, responses: dict[ResponseKey, str]) -> None:
    """Append responses that have no grades yet, and flush them to the disk."""
    with (folder / GENERATIONS).open("a", encoding="utf-8") as file:
        for (benchmark, problem, sample), output in responses.items():
            row = {"suite": benchmark, "id": problem, "sample": sample, "output": output}
            file.write(_to_line(row))
        file.flush()
        os.fsync(file.fileno())


def write_graded(folder: Path, graded: Sequence[dict]) -> None:
    """Replace all responses to the benchmarks in `graded` by these rows.

    They come after the rows of other benchmarks, which stay as they are.
    """
    path = folder / GENERATIONS
    benchmarks = {row["suite"] for row in graded}
    others = [row for row in read_generations(path) if row["suite"] not in benchmarks]
    _write_rows(path, [*others, *graded])


def read_generations(path: Path) -> list[dict]:
    """Read a file of responses, without a last line that has no end: a kill cut it short.

    Raises:
        UserError: another line is not a JSON object; the message has its number.
    """
    rows = []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"line {number} of {path} is not JSON ({error}); mend or remove it"
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"line {number} of {path} is not an object with fields; mend or remove it"
            )
        rows.append(row)
    return rows


def check_responses(rows: Sequence[dict], path: Path, option: str) -> None:
    """Check that rows of the file at `path`, which `option` names, can be graded.

    Raises:
        UserError: a row has no known suite, or no text `output`.
    """
    for number, row in enumerate(rows, start=1):
        if row.get("suite") not in BENCHMARKS or not isinstance(row.get("output"), str):
            raise UserError(
                f"{option}: row {number} of {path} needs a suite ({', '.join(BENCHMARKS)}) and the "
                "text output"
            )


def _write_rows(path: Path, rows: Sequence[dict]) -> None:
    write_text(path, "".join(map(_to_line, rows)))


def _to_line(row: dict) -> str:
    # Escaped to ASCII: a response may hold half of a surrogate pair, which UTF-8 cannot encode.
    return json.dumps(row, ensure_ascii=True) + "\n"
