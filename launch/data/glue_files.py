"""Rows of GLUE's own TSV files, as they come from its archive, under the hub's names of fields.

They are not CSV: a tab always separates columns and a quote is a character like others. CoLA's have
no header. What the columns are called is in eval.glue.
"""

import math
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from eval.glue import GLUE, GlueTask
from launch.data.readers import UnreadableError, read_lines

# Split -> its file, of all tasks.
FILES = {
    "train": "train.tsv",
    "validation": "dev.tsv",
    "validation_matched": "dev_matched.tsv",
    "validation_mismatched": "dev_mismatched.tsv",
}
COLA_COLUMNS = ["source", "label", "mark", "sentence"]
# MRPC as Microsoft published it. GLUE's training set is the first without the pairs of dev_ids.tsv.
MSR_TRAIN, MSR_DEV_IDS = "msr_paraphrase_train.txt", "dev_ids.tsv"
PairIds = tuple[str, str]


class BadLine(NamedTuple):
    """What stands in the fields of a row whose line cannot be read. It is not text."""

    place: str
    fault: str

    def __str__(self) -> str:
        return f"{self.place}: {self.fault}"


class GlueSplit(NamedTuple):
    """A split of a task of GLUE."""

    file: Path
    read: Callable[[Path, Collection[str] | None], Iterator[dict]]


def find_glue_splits(path: Path, task: str | None) -> dict[str, GlueSplit] | None:
    """Find the labelled splits of a task of GLUE in a folder of its TSV files.

    Args:
        path: the task's folder, such as MRPC, or the one that holds it.
        task: a name in eval.glue.GLUE, or anything else.

    Returns:
        Split -> its file and reader; None if `task` is none of GLUE's, or if there are no such files
        and a README.md may say which files there are.

    Raises:
        UnreadableError: there are neither, or GLUE's dev_ids.tsv is missing beside MRPC's pairs.
    """
    if task not in GLUE:
        return None
    facts = GLUE[task]
    for folder in (path, path / facts.folder):
        found = {}
        for split in facts.rows:
            file = folder / FILES[split]
            if file.is_file():
                found[split] = GlueSplit(file, partial(_read_rows, task))
        if not found and task == "mrpc" and (folder / MSR_TRAIN).is_file():
            found = _find_msr_splits(folder)
        if found:
            return found
    if (path / "README.md").is_file():
        return None
    raise UnreadableError(
        f"{path} has none of GLUE's files for {task} ({', '.join(FILES[split] for split in facts.rows)}), "
        f"nor has {path / facts.folder}; for other files set data.config to null"
    )


def describe_size(split: str, task: str, num_rows: int) -> str | None:
    """Say that a split has another number of rows than the official one; None if it has not."""
    official = GLUE[task].rows[split]
    if num_rows == official:
        return None
    return f"split {split} of {task} has {num_rows} rows; GLUE's has {official}"


def _find_msr_splits(folder: Path) -> dict[str, GlueSplit]:
    """Make MRPC's splits of Microsoft's file. Raises UnreadableError without GLUE's dev_ids.tsv."""
    file, ids_file = folder / MSR_TRAIN, folder / MSR_DEV_IDS
    if not ids_file.is_file():
        raise UnreadableError(
            f"{file}: which of its pairs are for development is in GLUE's {MSR_DEV_IDS}, which is "
            "not beside it; put it there, or give a folder with train.tsv and dev.tsv"
        )
    return {
        "train": GlueSplit(file, partial(_read_msr_rows, ids_file, False)),
        "validation": GlueSplit(file, partial(_read_msr_rows, ids_file, True)),
    }


def _read_rows(
    task: str, path: Path, fields: Collection[str] | None = None
) -> Iterator[dict[str, object]]:
    """Yield the rows of a file of `task`: its texts, and `label` as on the hub.

    The label is an index of a class, or a number. A line that cannot be read is a row of BadLine.

    Args:
        fields: not used: every field is read.

    Raises:
        UnreadableError: the file cannot be read or is not UTF-8, or its header lacks a column.
    """
    for row, _ in _iterate_rows(task, path):
        yield row


def _read_msr_rows(
    ids_file: Path, is_dev: bool, path: Path, fields: Collection[str] | None = None
) -> Iterator[dict[str, object]]:
    """Yield the rows of Microsoft's file that are, or are not, for development; see `_read_rows`."""
    dev_ids: set[PairIds] = set()
    for _, line in read_lines(ids_file):
        dev_ids.add(tuple(line.split("\t")[:2]))
    for row, columns in _iterate_rows("mrpc", path):
        is_bad = isinstance(row["label"], BadLine)  # of neither set: both say it
        if is_bad or ((columns["#1 ID"], columns["#2 ID"]) in dev_ids) == is_dev:
            yield row


def _iterate_rows(task: str, path: Path) -> Iterator[tuple[dict[str, object], dict[str, str]]]:
    """Yield each row with its line's columns, which are {} for a line that cannot be read."""
    facts = GLUE[task]
    names = {"sentence1": facts.sentence1, "sentence2": facts.sentence2, "label": "label"}
    fields = {name: facts.columns.get(name, name) for name in names.values() if name is not None}
    header = COLA_COLUMNS if task == "cola" else None
    for number, line in read_lines(path):
        if not line:
            continue
        values = line.split("\t")
        if header is None:
            header = values
            _require_columns(path, task, header, list(fields.values()))
            continue
        place = f"line {number} of {path.name}"
        if len(values) != len(header):
            fault = BadLine(place, f"{len(values)} columns, not {len(header)}")
            yield dict.fromkeys(fields, fault), {}
            continue
        columns = dict(zip(header, values, strict=True))
        row: dict[str, object] = {field: columns[column] for field, column in fields.items()}
        label = _read_label(facts, columns[fields["label"]])
        if label is None:
            row["label"] = BadLine(place, f"label {columns[fields['label']][:20]!r}")
        else:
            row["label"] = label
        yield row, columns


def _require_columns(path: Path, task: str, header: list[str], wanted: list[str]) -> None:
    """Raise UnreadableError if the header of a file lacks a column of the task."""
    missing = [column for column in wanted if column not in header]
    if missing:
        folder = GLUE[task].folder
        raise UnreadableError(
            f"{path}: its first line has no column {missing[0]!r}, as GLUE's {folder} has; "
            f"give the folder {folder}, or set task.name or data.config to the task of these files"
        )


def _read_label(task: GlueTask, text: str) -> int | float | None:
    """Return the hub's label for that of a TSV file; None if it is none of the task's."""
    if task.kind == "regression":
        try:
            number = float(text)
        except ValueError:
            return None
        return number if math.isfinite(number) else None
    if text in task.labels:
        return task.labels.index(text)
    indices = [str(index) for index in range(len(task.labels))]
    return indices.index(text) if text in indices else None
