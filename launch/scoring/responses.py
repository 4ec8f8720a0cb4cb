"""generations.jsonl: the responses of an evaluation, appended as they come, graded at the end.

Each line is a JSON object: suite, id (of the problem), sample (from 0), request_sha256 (of what the
response was made for, see launch.scoring.requests.Request), output (the response) and, where they
are true, overlong (the prompt was too long for the model) and truncated (the response was cut off);
once graded also question, reference, a boolean for each grader and, of a program, reason and
isolation. Rows of earlier versions have no request_sha256 and do not say whether they are truncated.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from eval.tasks import BENCHMARKS
from launch.models.identity import records_agree
from launch.runtime.errors import UserError
from launch.runtime.files import write_json, write_text

GENERATIONS = "generations.jsonl"
SETTINGS = "generation.json"  # what the responses in GENERATIONS depend on
PREVIOUS = "generations.previous.jsonl"  # see `_name_previous`

ResponseKey = tuple[str, str, int]
"""Names one response: benchmark, id of the problem, number of the sample."""


class Response(NamedTuple):
    """A response, and what it was made for."""

    output: str  # empty if `overlong`
    overlong: bool = False  # the prompt is too long for the model
    request_sha256: str | None = None  # None of a response of an earlier version
    truncated: bool = False  # known to be cut off; earlier versions did not record it


class Wanted(NamedTuple):
    """What tells whether a response on the disk answers a request."""

    request_sha256: str
    question: str  # for responses of earlier versions, which have no hash


def open_responses(
    folder: Path, made_with: dict, wanted: Mapping[ResponseKey, Wanted]
) -> dict[ResponseKey, Response]:
    """Open `folder` for responses, and read those that an earlier start left there.

    If they were made with something else than `made_with`, the whole file becomes PREVIOUS. If any
    response answers another prompt than the one `wanted` under its name, as of another data folder,
    the whole file is copied to PREVIOUS, and only those that still fit are kept. Responses of that
    benchmark that `wanted` does not list, such as those beyond a limit, are dropped too: they answer
    the other prompts.

    Args:
        made_with: all that responses depend on besides their prompts, as JSON values: model,
            adapter, decoding.

    Returns:
        Responses to the requests in `wanted`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, note = folder / GENERATIONS, folder / SETTINGS
    if path.is_file() and not _was_made_with(note, made_with):
        previous = set_aside(folder)
        print(f"{path} was made with other settings, and is {previous.name} now", flush=True)
    write_json(note, made_with)
    rows = read_generations(path) if path.is_file() else []
    keys = [_read_key(row, number, path) for number, row in enumerate(rows, start=1)]
    stale = set()  # benchmarks
    for key, row in zip(keys, rows, strict=True):
        if key in wanted and not _answers(row, wanted[key]):
            stale.add(row["suite"])
    kept, responses = [], {}
    for key, row in zip(keys, rows, strict=True):
        if key not in wanted:  # of another benchmark, or beyond a limit
            if row["suite"] not in stale:
                kept.append(row)
        elif _answers(row, wanted[key]):
            kept.append(row)
            responses[key] = read_response(row)
    if len(kept) < len(rows):
        previous = _name_previous(folder)
        shutil.copyfile(path, previous)
        print(
            f"{path}: {len(rows) - len(kept)} responses are to other prompts than those of now, or "
            f"of an earlier version that did not record their prompts; what is wanted of them is "
            f"made again, and {previous.name} has them",
            flush=True,
        )
    # Written again without a last line that a kill cut short, which the next append would continue.
    write_rows(path, kept)
    return responses


def set_aside(folder: Path) -> Path | None:
    """Rename the responses in `folder`, so that none is reused. Returns their file; None without any."""
    path = folder / GENERATIONS
    return path.replace(_name_previous(folder)) if path.is_file() else None


def _name_previous(folder: Path) -> Path:
    """Return PREVIOUS in `folder`, with the first number that no file there has: 2, 3 and so on."""
    path, number = folder / PREVIOUS, 1
    while path.exists():
        number += 1
        path = folder / f"generations.previous-{number}.jsonl"
    return path


def _read_key(row: dict, number: int, path: Path) -> ResponseKey:
    try:
        return _get_key(row)
    except KeyError as error:
        raise UserError(
            f"line {number} of {path} has no {error.args[0]}; is it a file of responses? mend or "
            "remove it"
        ) from None


def _get_key(row: dict) -> ResponseKey:
    return row["suite"], row["id"], row["sample"]


def read_response(row: dict) -> Response:
    """Return the response in a row of GENERATIONS."""
    return Response(
        row["output"],
        row.get("overlong", False),
        row.get("request_sha256"),
        row.get("truncated", False),
    )


def _answers(row: dict, wanted: Wanted) -> bool:
    """Return whether the response in `row` was made for the request that is wanted.

    An earlier version recorded the question of graded responses only.
    """
    if "request_sha256" in row:
        return row["request_sha256"] == wanted.request_sha256
    return row.get("question") == wanted.question


def _was_made_with(note: Path, made_with: dict) -> bool:
    if not note.is_file():
        return False
    as_written = json.loads(json.dumps(made_with))  # a tuple, say, is read back as a list
    return records_agree(json.loads(note.read_text(encoding="utf-8")), as_written)


def count_cut_responses(responses: Iterable[tuple[str | None, Response]]) -> dict[str, object]:
    """Return the fields of Score on too long prompts and truncated responses.

    Args:
        responses: of one benchmark, each with the id of its problem, None where it has none.
    """
    overlong: dict[str, None] = {}
    truncated = 0
    for problem, response in responses:
        truncated += response.truncated is True  # a file of others may say anything
        if response.overlong and problem is not None:
            overlong[problem] = None
    counted: dict[str, object] = {}
    if truncated:  # 0 would be a claim about responses of earlier versions, which do not say it
        counted["truncated"] = truncated
    if overlong:
        counted["overlong"] = list(overlong)
    return counted


def append_responses(folder: Path, responses: Mapping[ResponseKey, Response]) -> None:
    """Append responses that have no grades yet, and flush them to the disk."""
    with (folder / GENERATIONS).open("a", encoding="utf-8") as file:
        for key, response in responses.items():
            file.write(_to_line(make_row(key, response, {})))
        file.flush()
        os.fsync(file.fileno())


def make_row(key: ResponseKey, response: Response, grades: Mapping[str, object]) -> dict:
    """Make the row of a response; `grades` has the further fields of a graded one."""
    benchmark, problem, sample = key
    row = {"suite": benchmark, "id": problem, "sample": sample}
    if response.request_sha256 is not None:
        row["request_sha256"] = response.request_sha256
    if response.overlong:
        row["overlong"] = True
    if response.truncated:
        row["truncated"] = True
    known = {name: grades[name] for name in ("question", "reference") if name in grades}
    return row | known | {"output": response.output} | dict(grades)


def write_graded(folder: Path, graded: Sequence[dict]) -> None:
    """Replace the responses that `graded` has by its rows.

    They come after the others, of other benchmarks or beyond a limit, which stay as they are.
    """
    path = folder / GENERATIONS
    replaced = {_get_key(row) for row in graded}
    others = [row for row in read_generations(path) if _get_key(row) not in replaced]
    write_rows(path, [*others, *graded])


def read_generations(path: Path) -> list[dict]:
    """Read a file of responses, without a last line that has no end: a kill cut it short.

    Raises:
        UserError: another line is not a JSON object; the message has its number. Or the file is no
            text in UTF-8.
    """
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte-order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 ({error}); give a file of responses") from None
    *lines, _ = text.split("\n")
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


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    """Write a file of responses, whole or not at all."""
    write_text(path, "".join(map(_to_line, rows)))


def _to_line(row: dict) -> str:
    # Escaped to ASCII: a response may hold half of a surrogate pair, which UTF-8 cannot encode.
    return json.dumps(row, ensure_ascii=True) + "\n"
