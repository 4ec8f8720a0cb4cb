"""Rows of a benchmark, from a folder of files or from the Hugging Face hub."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from eval.errors import EvalError


class Source(NamedTuple):
    """Where a benchmark's rows are."""

    suite: str
    files: tuple[str, ...]  # below a data folder; the first that is there is read
    hub_id: str
    config: str | tuple[str, ...] | None  # several are read one after another
    split: str
    revision: str = "main"  # no commit could be looked up where this was written


def read(source: Source, data_dir: Path | None) -> Iterator[dict]:
    """Every row, in order: of a .jsonl, .json (a list), either with .gz, or .parquet file in `data_dir`, or of the hub.

    Raises:
        EvalError: none of the files is there, one cannot be read, or a row is not an object; the message names it.
    """
    if data_dir is None:
        yield from _hub(source)
        return
    path = next((data_dir / name for name in source.files if (data_dir / name).is_file()), None)
    if path is None:
        raise EvalError(f"{source.suite}: {data_dir} has none of {', '.join(source.files)}")
    number = 0
    for number, row in enumerate(_lines(path, source.suite), start=1):
        if not isinstance(row, dict):
            raise EvalError(f"{source.suite}: row {number} of {path} is not an object with fields")
        yield row
    if not number:
        raise EvalError(f"{source.suite}: no problems in {path}")


def text(row: dict, field: str, source: Source, number: int) -> str:
    """The text in `field` of row `number`. Raises EvalError if there is none."""
    value = row.get(field)
    if not isinstance(value, str):
        raise EvalError(
            f"{source.suite}: row {number} needs the text field {field}, and has {', '.join(row) or 'none'}"
        )
    return value


def _lines(path: Path, suite: str) -> Iterator[object]:
    if path.suffix == ".parquet":
        from pyarrow import ArrowInvalid, parquet

        try:
            yield from parquet.read_table(path).to_pylist()
        except (ArrowInvalid, OSError) as error:
            raise EvalError(f"{suite}: cannot read {path}: {error}") from None
        return
    at = None
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if path.name.removesuffix(".gz").endswith(".json"):
                yield from json.load(file)
                return
            for number, line in enumerate(file, start=1):
                at = number
                yield json.loads(line)
    except (ValueError, RecursionError, OSError, EOFError, TypeError) as error:
        # ValueError also for what is not UTF-8; RecursionError for what is too deep to read.
        where = f"line {at} of {path}" if at else str(path)
        raise EvalError(f"{suite}: {where} is not JSON: {error}") from None


def _hub(source: Source) -> Iterator[dict]:
    import datasets

    try:
        for config in source.config if isinstance(source.config, tuple) else (source.config,):
            yield from datasets.load_dataset(
                source.hub_id, config, split=source.split, revision=source.revision
            )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise EvalError(
            f"{source.suite}: cannot get {source.hub_id} from the hub ({reason}); give a folder as data_dir"
        ) from None
