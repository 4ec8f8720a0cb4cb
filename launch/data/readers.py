"""Rows of one file, exactly as they are written: text stays text, and no type is guessed.

`datasets` and pyarrow infer a type for every column of JSON and CSV. Text that looks like dates or
numbers then arrives changed, and whether it does depends on the rows and files around it. Here a
JSON string is text whatever it looks like, and every other JSON value is not text.

A new file format is one function and one line in `READERS`.
"""

import codecs
import contextlib
import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa

Reader = Callable[[Path, Collection[str] | None], Iterator[dict[str, Any]]]
BATCH = 2000  # rows of a Parquet file that are read at a time
BLOCK = 2**20  # bytes of a JSON list that are read at a time
BEGIN = 2**16  # bytes from which the form of a JSON file is seen
# Byte-order marks of other encodings than UTF-8, whose own mark is skipped.
OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_SPACE = re.compile(r"[ \t\n\r]*")  # between JSON values
_LINE_SPACE = b" \t\n\r"


class UnreadableError(ValueError):
    """A file does not hold rows; the message names the file, the place and the fault."""


class NotText(NamedTuple):
    """A value that Python could take for text, of a column whose type is not text."""

    type: str
    value: object

    def __str__(self) -> str:
        return f"{self.value!r} of type {self.type}"


def find_reader(path: Path) -> Reader | None:
    """Return the function that reads the file at `path`, by its ending; None if there is none."""
    name = path.name.lower()
    ending = Path(name.removesuffix(".gz")).suffix
    if name.endswith(".gz") and ending not in GZIPPED:
        return None
    return READERS.get(ending)


def read_json_rows(path: Path, fields: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file with one JSON object a line, or with one list of objects.

    Lines of white space alone are skipped. A list is read piece by piece.

    Args:
        fields: not used: every field is read.

    Raises:
        UnreadableError: the file cannot be read or is not UTF-8; a line or the list is not JSON; a
            row is not an object, or has a field twice.
    """
    with _explain_faults(path), _open_binary(path) as file:
        begin = file.read(BEGIN)
    _require_utf8(path, begin)
    mark_length = len(codecs.BOM_UTF8) if begin.startswith(codecs.BOM_UTF8) else 0
    content = begin[mark_length:].lstrip(_LINE_SPACE)
    if not content and len(begin) < BEGIN:
        raise UnreadableError(f"{path} is empty; give a file with rows")
    read = _read_list if content.startswith(b"[") else _read_lines
    with _explain_faults(path), _open_binary(path) as file:
        file.read(mark_length)
        yield from read(path, file)


def _read_lines(path: Path, file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file, one a line. Raises UnreadableError."""
    # Only \n ends a line: U+2028 and the other line ends of Unicode may stand within a string.
    for number, line in enumerate(file, start=1):
        if not line.strip(_LINE_SPACE):
            continue
        where = f"line {number} of {path}"
        try:
            row = _DECODER.decode(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise UnreadableError(f"{where}: {_describe_fault(error)}") from None
        yield _require_object(row, where)


def _read_list(path: Path, file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file that holds one JSON list of them. Raises UnreadableError."""
    number = 1
    try:
        text = _JsonText(file)
        text.take_character()  # the opening bracket
        is_open = text.peek() != "]"
        if not is_open:
            text.take_character()
        while is_open:
            yield _require_object(text.take_value(), f"row {number} of {path}")
            character = text.take_character()
            if character not in (",", "]"):
                found = repr(character) if character else "the end of the file"
                raise ValueError(f"it is followed by {found}, not by a comma or ]")
            is_open = character == ","
            number += 1
        if text.peek():
            raise UnreadableError(f"{path}: its list is followed by more text; remove that")
    except UnreadableError:
        raise
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"row {number} of {path}: {_describe_fault(error)}") from None


class _JsonText:
    """The text of a JSON file, read piece by piece."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text = ""
        self._position = 0  # up to where it was taken

    def peek(self) -> str:
        """Return the next character that is not white space; "" at the end of the file."""
        while True:
            self._position = _SPACE.match(self._text, self._position).end()
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._extend():
                return ""

    def take_character(self) -> str:
        """Take and return the next character that is not white space; "" at the end."""
        character = self.peek()
        self._position += len(character)
        return character

    def take_value(self) -> object:
        """Take and return the next JSON value. Raises ValueError or RecursionError."""
        self.peek()
        while True:
            try:
                value, self._position = _DECODER.raw_decode(self._text, self._position)
                return value
            except json.JSONDecodeError:
                if not self._extend():  # what there is of the value may be its beginning alone
                    raise

    def _extend(self) -> bool:
        """Forget the text that was taken, and read more; return whether there was any.

        At least as much is read as is kept, so a value of any length takes few attempts.
        """
        self._text = self._text[self._position :]
        self._position = 0
        more = self._file.read(max(BLOCK, len(self._text)))
        self._text += self._decode(more, final=not more)
        return bool(more)


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object. Raises ValueError if a field is there twice: either could be meant."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} is there twice; keep one")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_make_object)


def _require_object(row: object, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        shown = repr(row)[:60]
        raise UnreadableError(f"{where}: {shown} is not an object with fields")
    return row


def read_csv(path: Path, fields: Collection[str] | None = None) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV file (RFC 4180) with a header. Every value is text.

    A value that is missing cannot be told from an empty one: both are "".

    Args:
        fields: not used: every column is read.

    Raises:
        UnreadableError: the file cannot be read or is not UTF-8, the header is empty or has a name
            twice, or a row has another number of values.
    """
    csv.field_size_limit(sys.maxsize)  # of the whole process; by default 128 KiB
    with _explain_faults(path), _open_binary(path) as file:
        rows = csv.reader(_decode_lines(path, file), strict=True)
        number = 0  # of the row
        try:
            header = next(rows, [])
            _require_header(path, header)
            for values in rows:
                if not values:  # an empty line
                    continue
                number += 1
                if len(values) != len(header):
                    raise csv.Error(f"{len(values)} values, but the header has {len(header)} names")
                yield dict(zip(header, values, strict=True))
        except csv.Error as error:
            where = f"line {rows.line_num} of {path} (about row {number})"
            raise UnreadableError(f"{where} is not CSV: {error}") from None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of each line of a file, without its end.

    Raises:
        UnreadableError: the file is empty, cannot be read or is not UTF-8.
    """
    _require_content(path)
    with _explain_faults(path), _open_binary(path) as file:
        for number, line in enumerate(_decode_lines(path, file), start=1):
            yield number, line.removesuffix("\n").removesuffix("\r")


def _decode_lines(path: Path, file: IO[bytes]) -> Iterator[str]:
    """Yield the lines of a file with their ends. Raises UnreadableError if one is not UTF-8."""
    for number, line in enumerate(file, start=1):
        if number == 1:
            _require_utf8(path, line)
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UnreadableError(f"line {number} of {path}: {_describe_fault(error)}") from None


def _require_header(path: Path, header: list[str]) -> None:
    if not header:
        raise UnreadableError(f"{path} is empty; its first line must name the columns")
    _require_distinct(path, header)


def _require_distinct(path: Path, names: Sequence[str]) -> None:
    """Raise UnreadableError if two columns have one name."""
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UnreadableError(f"{path}: column {twice[0]!r} is there twice; rename one")


def read_parquet(path: Path, fields: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file.

    Args:
        fields: the columns to read, those of them that there are; all when None.

    Raises:
        UnreadableError: the file is not Parquet or is damaged, or two columns have one name.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    _require_content(path)
    try:
        # As an OSFile: pyarrow could take a path for an address.
        with _explain_faults(path), ParquetFile(pa.OSFile(str(path))) as file:
            names = file.schema_arrow.names
            _require_distinct(path, names)
            present = names if fields is None else [name for name in names if name in fields]
            documents = _list_json_columns(file)
            for batch in file.iter_batches(BATCH, columns=present):
                yield from _convert_batch(batch, present, documents)
    except pa.ArrowException as error:
        raise UnreadableError(f"{path} is not whole Parquet: {str(error)[:200]}") from None


def _list_json_columns(file: Any) -> set[str]:
    """Return the columns of a Parquet file that it declares as JSON documents."""
    found = set()
    for index in range(len(file.schema)):
        column = file.schema.column(index)
        if column.logical_type.type == "JSON":
            found.add(column.path)
    return found


def read_arrow(path: Path, fields: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of `save_to_disk`, an Arrow stream, mapped into memory.

    Args:
        fields: the columns to convert, those of them that there are; all when None.

    Raises:
        UnreadableError: the file is not an Arrow stream or is damaged, or two columns have one
            name.
    """
    import pyarrow as pa

    _require_content(path)
    try:
        with _explain_faults(path), pa.memory_map(str(path)) as file:
            stream = pa.ipc.open_stream(file)
            names = stream.schema.names
            _require_distinct(path, names)
            present = names if fields is None else [name for name in names if name in fields]
            for batch in stream:
                yield from _convert_batch(batch, present, set())
    except pa.ArrowException as error:
        raise UnreadableError(f"{path} is not a whole Arrow stream: {str(error)[:200]}") from None


def _convert_batch(
    batch: "pa.RecordBatch", names: Sequence[str], documents: Collection[str]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch with the columns `names`.

    Args:
        documents: columns that hold JSON documents, which are not text.
    """
    if not names:
        yield from ({} for _ in range(batch.num_rows))
        return
    columns = []
    for name in names:
        column = batch.column(batch.schema.get_field_index(name))
        if _is_text(column.type) and name not in documents:
            columns.append(_convert_text(column))
        else:
            kind = "json" if name in documents else str(column.type)
            values = column.to_pylist()
            columns.append(
                [NotText(kind, v) if isinstance(v, str) else _drop_absent(v) for v in values]
            )
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def _drop_absent(value: object) -> object:
    """Return a nested value without the keys whose value is null, at any depth.

    Arrow gives every struct of a column the keys of all: one that a row lacks, and one that it has
    as null, are the same there. Null as an element of a list stays.
    """
    if isinstance(value, dict):
        return {key: _drop_absent(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_drop_absent(one) for one in value]
    return value


def _is_text(kind: "pa.DataType") -> bool:
    """Return whether a column of this type holds text; an extension type (JSON) does not."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _convert_text(column: "pa.Array") -> list[Any]:
    """Return the values of a column of text. Bytes that are not UTF-8 become NotText."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_convert_scalar(value) for value in column]


def _convert_scalar(value: "pa.Scalar") -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return NotText("text that is not UTF-8", value.as_buffer().to_pybytes()[:60])


def _open_binary(path: Path) -> IO[bytes]:
    """Open a file to read its bytes, decompressed if its name ends in .gz. Raises OSError."""
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


@contextlib.contextmanager
def _explain_faults(path: Path) -> Iterator[None]:
    """Turn what reading a file raises into UnreadableError."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UnreadableError(f"{path} cannot be read: {str(error)[:200]}") from None


def _require_content(path: Path) -> None:
    with _explain_faults(path):
        size = path.stat().st_size
    if size == 0:
        raise UnreadableError(f"{path} is empty; give a file with rows")


def _require_utf8(path: Path, begin: bytes) -> None:
    """Raise UnreadableError if a file that begins with `begin` is UTF-16 or UTF-32."""
    if begin.startswith(OTHER_MARKS) or not json.detect_encoding(begin[:4]).startswith("utf-8"):
        raise UnreadableError(f"{path} is UTF-16 or UTF-32, or binary; save it as UTF-8")


def _describe_fault(error: Exception) -> str:
    """Say in a few words what is wrong with a piece of JSON."""
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"byte 0x{byte:02x} is not UTF-8; save the file as UTF-8"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON ({error.msg}, character {error.pos + 1})"
    return str(error)


# File ending -> what reads such a file; .gz may follow some.
READERS: dict[str, Reader] = {
    ".json": read_json_rows,
    ".jsonl": read_json_rows,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".ndjson": read_json_rows,
}
GZIPPED = (".json", ".jsonl", ".csv", ".ndjson")
ENDINGS = f"{', '.join(READERS)}, or one of {', '.join(GZIPPED)} with .gz"  # for messages
