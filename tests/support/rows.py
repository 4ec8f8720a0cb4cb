"""Rows in files of every format, and a tokenizer of one token a byte, for tests of reading rows."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Rows = Sequence[dict[str, str]]


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token a byte, with `</s>` as its end-of-sequence token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0} | {character: i for i, character in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    """Write one JSON value a line, in a folder that is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _encode_lines(rows: Rows, end: str = "\n", ascii_only: bool = False) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + end for row in rows).encode()


def _encode_csv(rows: Rows) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _write_parquet(path: Path, rows: Rows, kind: str) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    kinds = {
        "string": pa.string(),
        "large": pa.large_string(),
        "dictionary": pa.dictionary(pa.int32(), pa.string()),
    }
    columns = {}
    for name in rows[0]:
        columns[name] = pa.array([row[name] for row in rows], pa.string()).cast(kinds[kind])
    write_table(pa.table(columns), path)


def _save_to_disk(path: Path, rows: Rows) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(list(rows)).save_to_disk(path)


# Name of a file or folder -> what writes rows there.
WRITERS: dict[str, Callable[[Path, Rows], object]] = {
    "raw.jsonl": lambda path, rows: path.write_bytes(_encode_lines(rows)),
    "ascii.jsonl": lambda path, rows: path.write_bytes(_encode_lines(rows, ascii_only=True)),
    "marked.jsonl": lambda path, rows: path.write_bytes(
        b"\xef\xbb\xbf" + _encode_lines(rows, "\r\n\n")
    ),
    "lines.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(_encode_lines(rows))),
    "list.json": lambda path, rows: path.write_text(json.dumps(list(rows))),
    "indented.json": lambda path, rows: path.write_bytes(
        b"\xef\xbb\xbf \n" + json.dumps(list(rows), ensure_ascii=False, indent=2).encode()
    ),
    "list.json.gz": lambda path, rows: path.write_bytes(
        gzip.compress(json.dumps(list(rows)).encode())
    ),
    "string.parquet": lambda path, rows: _write_parquet(path, rows, "string"),
    "large.parquet": lambda path, rows: _write_parquet(path, rows, "large"),
    "dictionary.parquet": lambda path, rows: _write_parquet(path, rows, "dictionary"),
    "quoted.csv": lambda path, rows: path.write_bytes(_encode_csv(rows)),
    "marked.csv": lambda path, rows: path.write_bytes(b"\xef\xbb\xbf" + _encode_csv(rows)),
    "quoted.csv.gz": lambda path, rows: path.write_bytes(gzip.compress(_encode_csv(rows))),
    "saved": _save_to_disk,
}
