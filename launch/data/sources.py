"""Training rows as a recipe asks for them: from the hub, a folder in the hub's layout, or one file.

A new file format is one line in `FORMATS`, if the `datasets` library reads it.
"""

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
from launch.runtime.model_files import find_commit, is_hub_id

if TYPE_CHECKING:  # takes seconds to import, and finished tokens need none of it
    from datasets import Dataset

# The files of a data set that are downloaded from the hub.
HUB_FILES = ["*.parquet", "*.json", "*.jsonl", "*.json.gz", "*.jsonl.gz", "README.md"]
# File ending -> the builder of `datasets` that reads it; .gz may follow.
FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
CHUNK = 2000  # rows of the split that are read at a time
NOT_TEXT, EMPTY = "not text", "empty"


class Row(NamedTuple):
    """A row that can be trained on."""

    number: int  # in the split, from 1
    instruction: str
    input: str  # "" where there is none
    answer: str


class BadRow(NamedTuple):
    """A row that cannot be trained on."""

    number: int  # in the split, from 1
    reason: str  # the kind of fault, by which bad rows are counted
    what: str  # what is wrong with this row, for people


class Chunk(NamedTuple):
    """What `select_rows` finds in one stretch of the split."""

    position: int  # rows of the split read so far
    selected: int  # of them, rows that pass the filter
    rows: list[Row]
    bad: list[BadRow]


def fetch_source(data: Data) -> Path:
    """Return the file or folder of the rows: data.path itself, or the hub's files.

    Raises:
        UserError: there is no such file, folder or data set, or the hub is not reachable.
    """
    path = Path(data.path).expanduser()
    if path.exists():
        return path
    if not is_hub_id(data.path):
        raise UserError(f"data.path: no file or folder {data.path}")
    try:
        folder = snapshot_download(
            data.path, repo_type="dataset", revision=data.revision, allow_patterns=HUB_FILES
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"data.path: cannot load {data.path} (revision {data.revision}) from the hub "
            f"({type(error).__name__}); check the name and the network, or give a local file or "
            "folder, or data.prepared"
        ) from None
    return Path(folder)


def identify_source(path: Path) -> dict:
    """Describe what decides the rows' bytes without reading them.

    Returns:
        The hub's commit, else every file's size and time of change.
    """
    commit = find_commit(path)
    if commit:
        return {"commit": commit}
    files = {}
    for name, file in list_data_files(path).items():
        stat = file.stat()
        files[name] = [stat.st_size, stat.st_mtime_ns]
    return {"files": files}


def list_data_files(path: Path) -> dict[str, Path]:
    """Return the files that `load_split` may read, by their names below `path`.

    Of a folder those are all but hidden ones, since `datasets` chooses among them.
    """
    if path.is_file():
        return {path.name: path}
    found = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        hidden = any(part.startswith(".") for part in name.parts)
        if file.is_file() and not hidden:
            found[name] = file
    return {str(name): found[name] for name in sorted(found)}


def load_split(data: Data, path: Path) -> "Dataset":
    """Load the split at `path` with the columns that `data` names, memory-mapped.

    Raises:
        UserError: a file or folder cannot be read, or a column is not there.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # the error itself says what is wrong
    try:
        if path.is_file():
            kind = _find_format(path)
            dataset = datasets.load_dataset(kind, data_files=str(path), split="train")
        else:
            dataset = datasets.load_dataset(str(path), name=data.config, split=data.split)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise UserError(
            f"data.path: cannot load {data.path} (split {data.split}): {type(cause).__name__}: "
            f"{str(cause)[:300]}"
        ) from None
    columns = _list_columns(data)
    for key, fields in columns.items():
        for field in fields:
            _require_column(dataset.column_names, field, key, data.path)
    return dataset.select_columns(
        sorted({field for fields in columns.values() for field in fields})
    )


def _find_format(path: Path) -> str:
    """Return the builder of `datasets` for a file. Raises UserError for any other or an empty one."""
    kind = FORMATS.get(Path(path.name.removesuffix(".gz")).suffix)
    if kind is None:
        raise UserError(f"data.path: {path} is none of {', '.join(FORMATS)}, or one with .gz")
    if path.stat().st_size == 0:
        raise UserError(f"data.path: {path} is empty")
    return kind


def _list_columns(data: Data) -> dict[str, list[str]]:
    """Return the columns that each field of the recipe names."""
    return {
        "data.instruction": [data.instruction],
        "data.answer": [data.answer],
        "data.filter": list(data.filter),
        "data.input": [data.input] if data.input else [],
    }


def _require_column(columns: list[str], field: str, key: str, path: str) -> None:
    if field not in columns:
        near = difflib.get_close_matches(field, columns, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        known = ", ".join(columns)
        raise UserError(f"{key}: no field {field!r} in the rows of {path}; {hint}fields: {known}")


def select_rows(
    dataset: "Dataset", data: Data, position: int = 0, selected: int = 0
) -> Iterator[Chunk]:
    """Yield the rows that pass the filter, the first data.limit of them, in order, by chunks.

    Bad rows count towards the limit.

    Args:
        position: where a killed start is resumed: rows of the split read before.
        selected: of them, rows that passed the filter.
    """
    patterns = {}
    for field, wanted in data.filter.items():
        patterns[field] = [wanted] if isinstance(wanted, str) else wanted
    while position < len(dataset) and (data.limit is None or selected < data.limit):
        rows: list[Row] = []
        bad: list[BadRow] = []
        columns = dataset[position : position + CHUNK]
        for values in zip(*columns.values(), strict=True):
            position += 1
            row = dict(zip(columns, values, strict=True))
            if not _passes_filter(row, patterns):
                continue
            selected += 1
            checked = _check_row(position, row, data)
            if isinstance(checked, Row):
                rows.append(checked)
            else:
                bad.append(checked)
            if selected == data.limit:
                break
        yield Chunk(position, selected, rows, bad)


def _passes_filter(row: dict, patterns: dict[str, list[str]]) -> bool:
    """Return whether every filtered field of a row matches one of its patterns."""
    for field, wanted in patterns.items():
        value = row[field]
        if not isinstance(value, str):
            return False
        if not any(fnmatchcase(value, pattern) for pattern in wanted):
            return False
    return True


def _check_row(number: int, row: dict, data: Data) -> Row | BadRow:
    """Return a row's texts, or what is wrong with it."""
    for field in (data.instruction, data.answer):
        value = row[field]
        if not isinstance(value, str):
            reason = NOT_TEXT
        elif not value.strip():
            reason = EMPTY
        else:
            continue
        shown = str(value)[:60] if value else repr(value)
        return BadRow(number, reason, f"field {field!r} is {shown}, {reason}")
    input_text = row[data.input] if data.input else None
    if not isinstance(input_text, str | None):
        what = f"field {data.input!r} is {str(input_text)[:60]}, {NOT_TEXT}"
        return BadRow(number, NOT_TEXT, what)
    if input_text is None or not input_text.strip():
        input_text = ""
    return Row(number, row[data.instruction], input_text, row[data.answer])
