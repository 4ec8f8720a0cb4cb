"""Training rows as a recipe asks for them: from the hub, a folder in the hub's layout, or one file."""

import difflib
import logging
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from launch.config.schema import Data
from launch.runtime.errors import UserError
from launch.runtime.model_files import commit_of, is_hub_id

if TYPE_CHECKING:  # takes seconds to import, and tokens that are there already need none of it
    from datasets import Dataset

FILES = [
    "*.parquet",
    "*.json",
    "*.jsonl",
    "*.json.gz",
    "*.jsonl.gz",
    "README.md",
]  # what is fetched from the hub
KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
CHUNK = 2000  # rows of the split that are read at a time
NOT_TEXT, EMPTY = "not text", "empty"


class Row(NamedTuple):
    """One good row."""

    number: int  # in the split, from 1
    instruction: str
    input: str  # "" where there is none
    answer: str


class BadRow(NamedTuple):
    """One row that cannot be trained on."""

    number: int  # in the split, from 1
    reason: str
    what: str  # for people


class Chunk(NamedTuple):
    """What `select` finds in a stretch of the split."""

    position: int  # rows of the split read so far
    selected: int  # of them, rows that pass data.keep
    rows: list[Row]
    bad: list[BadRow]


def fetch(data: Data) -> Path:
    """The file or folder with the rows: data.path itself, or the hub's files, downloaded or from the hub's cache.

    Raises:
        UserError: no such file, folder or data set, or the hub is not reachable.
    """
    path = Path(data.path).expanduser()
    if path.exists():
        return path
    if not is_hub_id(data.path):
        raise UserError(f"data.path: no file or folder {data.path}")
    try:
        return Path(
            snapshot_download(
                data.path, repo_type="dataset", revision=data.revision, allow_patterns=FILES
            )
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"data.path: cannot load {data.path} (revision {data.revision}) from the hub ({type(error).__name__}); "
            "check the name and the network, or give a local file or folder, or data.prepared"
        ) from None


def identify(path: Path) -> dict:
    """What decides the rows' bytes, found without reading them: the hub's commit, else each file's size and time."""
    commit = commit_of(path)
    if commit:
        return {"commit": commit}
    stats = {name: file.stat() for name, file in data_files(path).items()}
    return {"files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}}


def data_files(path: Path) -> dict[str, Path]:
    """The files that `load` may read, by name below `path`: of a folder all, since `datasets` chooses among them."""
    if path.is_file():
        return {path.name: path}
    found = {file.relative_to(path): file for file in path.rglob("*") if file.is_file()}
    hidden = {name for name in found if any(part.startswith(".") for part in name.parts)}
    return {str(name): found[name] for name in sorted(found.keys() - hidden)}


def load(data: Data, path: Path) -> "Dataset":
    """The split at `path` with the columns that `data` names, memory-mapped.

    Raises:
        UserError: a file or folder that cannot be read, or a column that is not there.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # the error itself says what is wrong
    try:
        if path.is_file():
            kind = KINDS.get(Path(path.name.removesuffix(".gz")).suffix)
            if kind is None:
                raise UserError(f"data.path: {path} is none of {', '.join(KINDS)}, or one with .gz")
            if path.stat().st_size == 0:
                raise UserError(f"data.path: {path} is empty")
            dataset = datasets.load_dataset(kind, data_files=str(path), split="train")
        else:
            dataset = datasets.load_dataset(str(path), name=data.config, split=data.split)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise UserError(
            f"data.path: cannot load {data.path} (split {data.split}): {type(cause).__name__}: {str(cause)[:300]}"
        ) from None
    columns = {
        "data.instruction": [data.instruction],
        "data.answer": [data.answer],
        "data.keep": list(data.keep),
    }
    columns["data.input"] = [data.input] if data.input else []
    for key, fields in columns.items():
        for field in fields:
            _require_column(dataset.column_names, field, key, data.path)
    return dataset.select_columns(
        sorted({field for fields in columns.values() for field in fields})
    )


def _require_column(columns: list[str], field: str, key: str, path: str) -> None:
    if field not in columns:
        near = difflib.get_close_matches(field, columns, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"{key}: no field {field!r} in the rows of {path}; {hint}fields: {', '.join(columns)}"
        )


def select(dataset: "Dataset", data: Data, position: int = 0, selected: int = 0) -> Iterator[Chunk]:
    """The rows that pass data.keep, the first data.limit of them, in order, a chunk at a time.

    `position` and `selected` are those of the chunk to go on after. Bad rows count towards the limit.
    """
    keep = {
        field: [wanted] if isinstance(wanted, str) else wanted
        for field, wanted in data.keep.items()
    }
    while position < len(dataset) and (data.limit is None or selected < data.limit):
        rows: list[Row] = []
        bad: list[BadRow] = []
        columns = dataset[position : position + CHUNK]
        for values in zip(*columns.values(), strict=True):
            position += 1
            row = dict(zip(columns, values, strict=True))
            if not all(_matches(row[field], patterns) for field, patterns in keep.items()):
                continue
            selected += 1
            checked = _check(position, row, data)
            (rows if isinstance(checked, Row) else bad).append(checked)
            if selected == data.limit:
                break
        yield Chunk(position, selected, rows, bad)


def _matches(value: object, patterns: list[str]) -> bool:
    return isinstance(value, str) and any(fnmatchcase(value, pattern) for pattern in patterns)


def _check(number: int, row: dict, data: Data) -> Row | BadRow:
    for field in (data.instruction, data.answer):
        value = row[field]
        reason = NOT_TEXT if not isinstance(value, str) else None if value.strip() else EMPTY
        if reason:
            return BadRow(
                number,
                reason,
                f"field {field!r} is {str(value)[:60] if value else value!r}, {reason}",
            )
    more = row[data.input] if data.input else None
    if not isinstance(more, str | None):
        return BadRow(number, NOT_TEXT, f"field {data.input!r} is {str(more)[:60]}, {NOT_TEXT}")
    return Row(
        number, row[data.instruction], more if more and more.strip() else "", row[data.answer]
    )
