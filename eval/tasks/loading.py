"""Read the rows of a benchmark, from a folder of files or from the Hugging Face hub."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from eval.errors import EvalError


class Source(NamedTuple):
    """Where a benchmark's rows are."""

    benchmark: str
    files: tuple[str, ...]  # paths below a data folder; the first that exists is read
    hub_id: str
    config: str | tuple[str, ...] | None  # several are read one after another
    split: str
    revision: str = "main"  # no commit could be looked up where this was written


def read_rows(source: Source, data_dir: Path | None) -> Iterator[dict]:
    """Yield every row of `source` in order, from a file in `data_dir`.

    If `data_dir` is None, the rows come from the hub. A file is .jsonl or .json (a list), with or
    without .gz, or .parquet.

    Raises:
        EvalError: no file exists, one cannot be read, has no row, or a row is not an object; the
            message says which.
    """
    place: str | Path | None = source.hub_id
    if data_dir is not None:
        paths = [data_dir / name for name in source.files]
        place = next((path for path in paths if path.is_file()), None)
    if place is None:
        raise EvalError(f"{source.benchmark}: {data_dir} has none of {', '.join(source.files)}")
    rows = _read_hub(source) if data_dir is None else _read_file(place, source.benchmark)
    number = 0
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise EvalError(
                f"{source.benchmark}: row {number} of {place} is not an object with fields"
            )
        yield row
    if not number:
        raise EvalError(f"{source.benchmark}: no problems in {place}")


def read_text_field(row: dict, field: str, source: Source, number: int) -> str:
    """Return the text in `field` of row `number`.

    Raises:
        EvalError: the row has no text there.
    """
    value = row.get(field)
    if not isinstance(value, str):
        raise EvalError(
            f"{source.benchmark}: row {number} needs the text field {field}, "
            f"and has {', '.join(row) or 'none'}"
        )
    return value


def _read_file(path: Path, benchmark: str) -> Iterator[object]:
    if path.suffix == ".parquet":
        yield from _read_parquet(path, benchmark)
        return
    line_number = None
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if path.name.removesuffix(".gz").endswith(".json"):
                yield from json.load(file)
                return
            for number, line in enumerate(file, start=1):
                line_number = number
                yield json.loads(line)
    except (ValueError, RecursionError, OSError, EOFError, TypeError) as error:
        # json raises ValueError also for text that is not UTF-8, RecursionError for deep nesting.
        where = f"line {line_number} of {path}" if line_number else str(path)
        raise EvalError(f"{benchmark}: {where} is not JSON: {error}") from None


def _read_parquet(path: Path, benchmark: str) -> Iterator[object]:
    from pyarrow import ArrowInvalid, parquet

    try:
        yield from parquet.read_table(path).to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise EvalError(f"{benchmark}: cannot read {path}: {error}") from None


def _read_hub(source: Source) -> Iterator[dict]:
    import datasets  # takes seconds, and files do not need it

    configs = source.config if isinstance(source.config, tuple) else (source.config,)
    try:
        for config in configs:
            yield from datasets.load_dataset(
                source.hub_id, config, split=source.split, revision=source.revision
            )
    # datasets raises RuntimeError for a data set that is a script.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise EvalError(
            f"{source.benchmark}: cannot get {source.hub_id} from the hub ({reason})",
            subject="data",
        ) from None
