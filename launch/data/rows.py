"""Rows as a recipe asks for them: from the hub, a folder, or one file.

Which files those are is in launch.data.layout, and how one is read in launch.data.readers.
"""

import contextlib
import difflib
import glob
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from launch.config.schema import Data
from launch.data.hub_layout import find_hub_files, list_data_files, list_hub_names
from launch.data.layout import Split, find_split, name_splits
from launch.data.readers import GZIPPED, READERS, UnreadableError, find_reader
from launch.models.files import download, find_commit, is_hub_id
from launch.run.progress import Progress, has_terminal
from launch.runtime.errors import UserError


def _match_any_case(ending: str) -> str:
    """Return a pattern of names with this ending in any case: `*.[jJ][sS]` for `.js`."""
    return "*" + "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in ending)


# Files of a data set on the hub that say which of its files belong to which split.
CARDS = ["README.md", ".huggingface.yaml"]
# All files that may hold rows.
ROW_FILES = [
    *(_match_any_case(ending) for ending in READERS),
    *(_match_any_case(f"{ending}.gz") for ending in GZIPPED),
]
CHUNK = 2000  # rows of the split that are read at a time
NOT_TEXT, EMPTY, NOT_UNICODE = "not text", "empty", "not valid Unicode"
BAD_TEXT = (NOT_TEXT, EMPTY, NOT_UNICODE)  # why a row has no texts to tokenise


class Row(NamedTuple):
    """A row that can be trained on."""

    number: int  # in the split, from 1
    instruction: str  # or the row's plain text
    input: str  # "" where there is none
    answer: str


class Conversation(NamedTuple):
    """A row with messages, which launch.data.chat checks."""

    number: int  # in the split, from 1
    messages: object  # the value of the field data.messages


class BadRow(NamedTuple):
    """A row that cannot be trained on."""

    number: int  # in the split, from 1
    reason: str  # the kind of fault, by which bad rows are counted
    what: str  # what is wrong with this row, for people


class Chunk(NamedTuple):
    """What `select_rows` finds in one stretch of the split."""

    position: int  # rows of the split read so far
    selected: int  # of them, rows that pass the filter
    rows: list  # of Row, Conversation, or what else RowForm.check gives
    bad: list[BadRow]
    unread: Counter[str]  # field of RowForm.unread -> selected rows that have something in it


# Fields in which other programs have a part of a conversation, or of an instruction.
PARTS_BESIDE_MESSAGES = ("system", "tools")
PARTS_BESIDE_INSTRUCTION = ("input", "system", "history")


class RowForm(NamedTuple):
    """What is read of a row, and how it is checked."""

    columns: dict[str, list[str]]  # field of the recipe -> fields of a row that it names
    check: Callable[[int, dict[str, Any]], Any]  # (number from 1, row) -> good row, or BadRow
    unread: tuple[str, ...] = ()  # fields that other programs read and `check` does not


def make_causal_form(data: Data) -> RowForm:
    """Make the form of rows with an instruction and an answer, or plain text; good ones are a Row."""
    columns = {
        "data.instruction": [data.instruction],
        "data.answer": [data.answer],
        "data.filter": list(data.filter),
        "data.input": [data.input] if data.input else [],
    }
    read = {data.instruction, data.answer, data.input}
    # Where data.input names another field, `input` is not what is missing.
    unread = PARTS_BESIDE_INSTRUCTION[1:] if data.input else PARTS_BESIDE_INSTRUCTION
    if data.text_field is not None:
        columns = {"data.text": [data.text_field], "data.filter": list(data.filter)}
        unread = ()
    if data.messages is not None:
        columns = {"data.messages": [data.messages], "data.filter": list(data.filter)}
        read, unread = {data.messages}, PARTS_BESIDE_MESSAGES
    unread = tuple(name for name in unread if name not in read)
    return RowForm(columns, lambda number, row: _check_row(number, row, data), unread)


def list_notes(
    split: Split, data: Data, unread: Mapping[str, int] | None = None, selected: int = 0
) -> list[str]:
    """List what is unusual about the rows of a split, and what of them is not read, for people.

    Args:
        unread: field -> rows that have something in it.
        selected: rows that pass the filter.
    """
    notes = [] if split.note is None else [f"data.path: {data.path}: {split.note}"]
    for name, count in (unread or {}).items():
        field, hint = "data.instruction", "answers are learnt without what it says"
        if data.messages is not None:
            field, hint = "data.messages", "put it into the list, as its first message"
        elif name == "input":
            field, hint = "data.input", "set data.input=input"
        notes.append(
            f"{field}: {count} of {selected} rows of {data.path} have a field {name!r}, which is not "
            f"read; {hint}"
        )
    return notes


def rename_fields(line: str, section: str, fields: Iterable[str]) -> str:
    """Return a line with `section` in the place of `data` before the names of `fields`."""
    names = re.compile(rf"(?<![\w./])data\.({'|'.join(fields)})\b")
    return names.sub(lambda match: f"{section}.{match[1]}", line)


def rename_notes(manifest: dict[str, Any], section: str, fields: Iterable[str]) -> dict[str, Any]:
    """Return a manifest whose notes on rows name `section` in the place of `data` (`rename_fields`).

    Manifests of earlier versions have no notes.
    """
    notes = [rename_fields(note, section, fields) for note in manifest.get("notes", ())]
    return manifest | {"notes": notes}


@contextlib.contextmanager
def naming_fields(section: str, fields: Iterable[str]) -> Iterator[None]:
    """Let errors about `data.FIELD` name `section` in its place, for rows that `section` describes.

    Args:
        fields: that `section` has; other fields stay those of `data`.
    """
    try:
        yield
    except UserError as error:
        line = rename_fields(str(error), section, fields)
        # An error about a field that stays `data`'s does not name the rows that have it.
        raise UserError(line if section in line else f"{line} ({section})") from None


def fetch_source(data: Data) -> Path:
    """Return the file or folder of the rows: data.path itself, or the hub's files.

    Raises:
        UserError: there is no such file, folder, data set or configuration, its README.md is wrong,
            or the hub is not reachable.
    """
    path = Path(data.path).expanduser()
    if path.is_file() or path.is_dir():
        return path
    if path.exists():
        raise UserError(f"data.path: {path} is neither a file nor a folder; copy it into a file")
    is_file = path.name.lower().endswith((*READERS, ".gz"))
    if is_file or not is_hub_id(data.path):
        raise UserError(
            f"data.path: no file or folder {data.path}; correct the path, or give a hub id"
        )
    return _fetch_from_hub(data)


def _fetch_from_hub(data: Data) -> Path:
    """Return the folder of a data set in the hub's cache, with the files of data.split in it.

    Of its other files only the names are fetched: a data set may have thousands of configurations.
    Where the cache cannot keep the names, all files that may hold rows are fetched.

    Raises:
        UserError: there is no such data set or configuration, its README.md is wrong, or the hub is
            not reachable.
    """
    folder = download("dataset", data.path, data.revision, "data.path", CARDS)
    folder.mkdir(parents=True, exist_ok=True)  # not made where the data set has none of them
    patterns = ROW_FILES
    if list_hub_names(folder):
        files = [folder / name for name in _find_split_files(data, folder)]
        missing = [file for file in files if find_reader(file) is not None and not file.is_file()]
        patterns = [glob.escape(str(file.relative_to(folder))) for file in missing]
    if patterns:  # by commit: the branch may have moved since
        download("dataset", data.path, folder.name, "data.path", patterns)
    return folder


def _find_split_files(data: Data, folder: Path) -> list[str]:
    """Return the names of the files of data.split in a folder of the hub's cache.

    Raises UserError if the folder has no such configuration, or its README.md is wrong.
    """
    try:
        found = find_hub_files(folder, name_splits(data.split), data.config)
    except UnreadableError as error:
        raise _make_loading_error(data, error) from None
    files = chain.from_iterable(found.files.values())
    return sorted({str(file.relative_to(folder)) for file in files})


def _make_loading_error(data: Data, error: UnreadableError) -> UserError:
    """Make the error of a split that cannot be read."""
    return UserError(f"data.path: cannot load {data.path} (split {data.split}): {error}")


def identify_source(data: Data, path: Path) -> dict:
    """Describe what decides the bytes of the rows at `path`, without reading them.

    Returns:
        The hub's commit and the names of the split's files, or of all files in a folder of the
        hub's cache that data.path names. Of other files every one's size, times of change and inode.

    Raises:
        UserError: a folder cannot be listed, or a file is a link to nothing.
    """
    if not Path(data.path).expanduser().exists():  # fetched from the hub
        return {"commit": find_commit(path), "split_files": _find_split_files(data, path)}
    try:
        found = list_data_files(path)
    except UnreadableError as error:
        raise UserError(f"data.path: {error}") from None
    commit = find_commit(path)
    if commit:
        return {"commit": commit, "files": list(found)}
    files = {}
    for name, file in found.items():
        stat = file.stat()
        # A tool can set mtime back, but not ctime.
        files[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    return {"files": files}


def limit_identity(source: dict, recorded: dict) -> dict:
    """Reduce `source` to what the version that wrote `recorded` would have written, so that the two can be compared."""
    known = recorded.get("files")
    if "commit" in source:
        if "split_files" in recorded:
            return source
        rest = {key: source[key] for key in source if key not in ("files", "split_files")}
        if known is None:  # the commit alone was recorded
            return rest
        # All files that had been fetched were recorded, and not those of the split alone.
        names = source.get("split_files")
        return source if names is None or set(names) - set(known) else rest | {"files": known}
    if not isinstance(known, dict):
        return source
    files = {name: state[: len(known.get(name, state))] for name, state in source["files"].items()}
    return source | {"files": files}


def load_split(data: Data, path: Path, form: RowForm | None = None) -> Split:
    """Find the rows of data.split at `path`, and check that they have the fields of `form`.

    Args:
        form: that of `make_causal_form` when None.

    Raises:
        UserError: a file or folder cannot be read, or no row has a field.
    """
    try:
        split = find_split(path, data.split, data.config)
    except UnreadableError as error:
        if path.is_file():
            raise UserError(f"data.path: {error}") from None
        raise _make_loading_error(data, error) from None
    _require_fields(split, data, form or make_causal_form(data))
    return split


def iterate_rows(split: Split, data: Data, fields: Sequence[str] | None) -> Iterator[dict]:
    """Yield the rows of a split, with at least `fields`; with all of them when None.

    Raises UserError where a file cannot be read.
    """
    try:
        yield from split.iterate_rows(fields)
    except UnreadableError as error:
        raise _make_loading_error(data, error) from None


def _require_fields(split: Split, data: Data, form: RowForm) -> None:
    """Raise UserError if no row has one of the fields of `form`.

    Rows may lack a field, so the rows are read up to the first that has the last field.
    """
    missing = {}
    for key, fields in form.columns.items():
        missing |= dict.fromkeys(fields, key)
    known: dict[str, None] = {}
    for row in iterate_rows(split, data, None):
        known |= dict.fromkeys(row)
        missing = {field: key for field, key in missing.items() if field not in row}
        if not missing:
            return
    for field, key in missing.items() if known else ():  # without any row, that is the fault
        _refuse_field(list(known), field, key, data.path)


def _refuse_field(known: list[str], field: str, key: str, path: str) -> None:
    near = difflib.get_close_matches(field, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"{key}: no field {field!r} in the rows of {path}; {hint}fields: {', '.join(known)}"
    )


def select_rows(
    split: Split,
    data: Data,
    position: int = 0,
    selected: int = 0,
    form: RowForm | None = None,
) -> Iterator[Chunk]:
    """Yield the rows that pass the filter, the first data.limit of them, in order, by chunks.

    Bad rows count towards the limit.

    Args:
        position: where a killed start is resumed: rows of the split read before.
        selected: of them, rows that passed the filter.
        form: that of `make_causal_form` when None.

    Raises:
        UserError: a file cannot be read.
    """
    form = form or make_causal_form(data)
    patterns = {}
    for field, wanted in data.filter.items():
        patterns[field] = [wanted] if isinstance(wanted, str) else wanted
    fields = [*chain.from_iterable(form.columns.values()), *form.unread]
    source = islice(iterate_rows(split, data, fields), position, None)
    while data.limit is None or selected < data.limit:
        rows = []
        bad: list[BadRow] = []
        unread: Counter[str] = Counter()
        begun_at = position
        for row in islice(source, CHUNK):
            position += 1
            if not _passes_filter(row, patterns):
                continue
            selected += 1
            unread.update(name for name in form.unread if _has_content(row.get(name)))
            checked = form.check(position, row)
            if isinstance(checked, BadRow):
                bad.append(checked)
            else:
                rows.append(checked)
            if selected == data.limit:
                break
        if position == begun_at:
            return
        yield Chunk(position, selected, rows, bad, unread)


@contextlib.contextmanager
def show_rows(split: Split, data: Data, name: str) -> Iterator[Callable[[Chunk], None]]:
    """Show the progress of reading rows, and yield what moves it on to the end of a chunk.

    A process of each node calls it; rank 0 shows it.

    Raises:
        UserError: a file cannot be read.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    total = data.limit
    if has_terminal():  # the rows are counted by reading them all
        count = sum(1 for _ in iterate_rows(split, data, ()))
        total = count if total is None else min(total, count)
    with Progress(name, total, rank, unit="rows") as progress:

        def advance(chunk: Chunk) -> None:
            reached = chunk.position if data.limit is None else chunk.selected
            progress.advance(reached - progress.done)

        yield advance


def _passes_filter(row: dict[str, Any], patterns: dict[str, list[str]]) -> bool:
    """Return whether every filtered field of a row matches one of its patterns."""
    for field, wanted in patterns.items():
        value = row.get(field)
        if not isinstance(value, str):
            return False
        if not any(fnmatchcase(value, pattern) for pattern in wanted):
            return False
    return True


def _has_content(value: object) -> bool:
    """Return whether there is something in a field; text may spell an empty list or object."""
    return value.strip() not in ("", "[]", "{}") if isinstance(value, str) else bool(value)


def _check_row(number: int, row: dict[str, Any], data: Data) -> Row | Conversation | BadRow:
    """Return a row's texts, or what is wrong with it; the messages of one are checked later."""
    if data.messages is not None:
        return Conversation(number, row.get(data.messages))
    if data.text_field is not None:
        return _check_text(number, row.get(data.text_field), data.text_field)
    texts = {field: row.get(field) for field in (data.instruction, data.answer)}
    if data.input:
        given = row.get(data.input)
        texts[data.input] = "" if given is None else given
    for field, value in texts.items():
        fault = find_text_fault(value)
        if fault is None and field != data.input and not value.strip():
            fault = EMPTY
        if fault is not None:
            return make_bad_row(number, field, value, fault)
    input_text = texts[data.input] if data.input else ""
    if not input_text.strip():
        input_text = ""
    return Row(number, texts[data.instruction], input_text, texts[data.answer])


def _check_text(number: int, text: object, field: str) -> Row | BadRow:
    """Return a row of plain text, as its instruction, or what is wrong with it. It may be blank."""
    fault = find_text_fault(text)
    if fault is not None:
        return make_bad_row(number, field, text, fault)
    return Row(number, text, input="", answer="")


def find_text_fault(value: object) -> str | None:
    """Return why a value cannot be tokenised, NOT_TEXT or NOT_UNICODE; None if it can."""
    if not isinstance(value, str):
        return NOT_TEXT
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell but UTF-8 cannot
        return NOT_UNICODE
    return None


def make_bad_row(number: int, field: str, value: object, fault: str) -> BadRow:
    """Make the bad row of a field whose value has a fault, by which the row is counted."""
    return BadRow(number, fault, f"field {field!r} is {show_value(value)}, {fault}")


def show_value(value: object) -> str:
    """Return the beginning of a value, on one line, for a message."""
    shown = repr(value) if isinstance(value, str) else str(value)
    return " ".join(shown[:60].split())
