"""Which files hold the rows of a split: one file, or a folder.

A folder is one of `save_to_disk`, has the hub's layout, or holds GLUE's own TSV files.

Whatever would leave rows out without a word is refused: a split or configuration that is not there,
shards that are missing, files of another format among those of the split.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from launch.data.glue_files import GlueSplit, describe_size, find_glue_splits
from launch.data.hub_layout import UNREAD, find_hub_files
from launch.data.readers import ENDINGS, Reader, UnreadableError, find_reader, read_arrow

TRAIN = "train"  # the split of a single file, and of a single data set of `save_to_disk`
_SHARD = re.compile(
    r"(?P<name>.*?)(?P<index>\d+)[-_. ]of[-_. ](?P<total>\d+)(?![A-Za-z0-9])", re.IGNORECASE
)


class Part(NamedTuple):
    """Rows that follow one another in some files."""

    files: tuple[Path, ...]
    read: Reader
    start: int = 0
    stop: int | None = None  # None for the last row


class Split(NamedTuple):
    """The rows of a split, in order."""

    parts: tuple[Part, ...]
    note: str | None = None  # what is unusual about the rows, for people

    def list_files(self) -> list[Path]:
        """Return the files that are read, each once."""
        return list(dict.fromkeys(chain.from_iterable(part.files for part in self.parts)))

    def iterate_rows(self, fields: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the rows, those of `fields` that they have, or more. Raises UnreadableError."""
        for part in self.parts:
            yield from islice(_iterate_files(part, fields), part.start, part.stop)

    def count_rows(self) -> int:
        """Count the rows by reading them. Raises UnreadableError."""
        return sum(1 for _ in self.iterate_rows(()))


def _iterate_files(part: Part, fields: Collection[str] | None) -> Iterator[dict[str, Any]]:
    for file in part.files:
        yield from part.read(file, fields)


def find_split(path: Path, split: str, config: str | None) -> Split:
    """Find the rows of a split in a file or folder.

    Args:
        split: as `datasets` spells it: `train`, `train[:10%]`, `train+test[5:]`.
        config: the configuration; None for the only one or the default. Of GLUE's own files, the
            task's name.

    Raises:
        UnreadableError: there is no such split or configuration; files of it are missing, or are of
            a format that is not read; or the rows of a slice cannot be counted.
    """
    if path.is_file():
        what = f"{path}, a single file,"
        reader = _require_reader(path)
        _refuse_config(config, what)
        return _cut_parts({TRAIN: Part((path,), reader)}, split, what)
    if _is_saved(path) or (path / "dataset_dict.json").is_file():
        _refuse_config(config, f"{path}, a folder of save_to_disk,")
        return _find_saved_split(path, split)
    glue = find_glue_splits(path, config)
    if glue is not None:
        return _find_glue_split(path, split, config, glue)
    return _find_hub_split(path, split, config)


def _is_saved(path: Path) -> bool:
    """Return whether a folder holds one data set of `save_to_disk`."""
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _refuse_config(config: str | None, what: str) -> None:
    if config is not None:
        raise UnreadableError(f"{what} has no configuration {config!r}; set data.config to null")


def _require_reader(path: Path) -> Reader:
    """Return the reader of a file. Raises UnreadableError if there is none."""
    reader = find_reader(path)
    if reader is None:
        hint = ""
        if path.suffix.lower() == ".tsv":
            hint = (
                "; TSV files differ in how they quote: convert it to CSV or JSONL. Of GLUE's own "
                "files give the folder, and set task.name or data.config to the task, such as mrpc"
            )
        raise UnreadableError(f"{path} is none of {ENDINGS}{hint}")
    if path.stat().st_size == 0:
        raise UnreadableError(f"{path} is empty; give a file with rows")
    return reader


def name_splits(split: str) -> list[str]:
    """Return the names in a split's specification: train and test of `train[:5]+test`."""
    return [re.split(r"[\[(]", piece)[0].strip() for piece in split.split("+")]


def _require_splits(split: str, known: Collection[str], what: str) -> None:
    for name in name_splits(split):
        if name not in known:
            raise UnreadableError(
                f"{what} has no split {name!r}; set data.split to {' or '.join(known)}, "
                "or to a part of it, such as train[:100]"
            )


def _cut_parts(wholes: Mapping[str, Part], split: str, what: str) -> Split:
    """Cut the slices of `split` out of whole splits. Raises UnreadableError."""
    _require_splits(split, wholes, what)
    if split in wholes:
        return Split((wholes[split],))
    import datasets

    try:
        instruction = datasets.ReadInstruction.from_spec(split)
        counts = {name: Split((wholes[name],)).count_rows() for name in name_splits(split)}
        cuts = instruction.to_absolute(counts)
    except UnreadableError:
        raise
    except (ValueError, AssertionError) as error:
        raise UnreadableError(f"data.split {split!r} cannot be read: {str(error)[:200]}") from None
    return Split(tuple(wholes[c.splitname]._replace(start=c.from_, stop=c.to) for c in cuts))


def _find_saved_split(path: Path, split: str) -> Split:
    """Find a split in a folder of `save_to_disk`. Raises UnreadableError."""
    what = f"{path}, a folder of save_to_disk,"
    if not (path / "dataset_dict.json").is_file():
        folders = {TRAIN: path}
    else:
        names = _read_json_field(path / "dataset_dict.json", "splits")
        folders = {name: path / name for name in names}
    _require_splits(split, folders, what)
    wholes = {}
    for name in name_splits(split):
        files = _list_saved_files(folders[name])
        wholes[name] = Part(tuple(files), read_arrow)
    return _cut_parts(wholes, split, what)


def _list_saved_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a saved data set, in order. Raises UnreadableError."""
    names = [entry["filename"] for entry in _read_json_field(folder / "state.json", "_data_files")]
    files = [folder / name for name in names]
    for name, file in zip(names, files, strict=True):
        if Path(name).name != name or not file.is_file():
            raise UnreadableError(f"{folder} lacks its file {name}; copy the whole folder")
    require_whole_shards(files)
    return files


def _read_json_field(path: Path, field: str) -> list[Any]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))[field])
    except (OSError, ValueError, KeyError, TypeError) as error:
        fault = f"{type(error).__name__}: {str(error)[:100]}"
        raise UnreadableError(f"{path} cannot be read ({fault}); save the data set again") from None


def _find_glue_split(path: Path, split: str, task: str, found: Mapping[str, GlueSplit]) -> Split:
    """Find a split among those of GLUE's own files. Raises UnreadableError."""
    what = f"{path} (GLUE's {task}, whose test rows have no labels)"
    wholes = {name: Part((part.file,), part.read) for name, part in found.items()}
    cut = _cut_parts(wholes, split, what)
    notes = []
    for name in dict.fromkeys(name_splits(split)):
        notes.append(describe_size(name, task, Split((wholes[name],)).count_rows()))
    return cut._replace(note="; ".join(filter(None, notes)) or None)


def _find_hub_split(path: Path, split: str, config: str | None) -> Split:
    """Find a split in a folder of the hub's layout. Raises UnreadableError."""
    names = name_splits(split)
    hub = find_hub_files(path, names, config)
    _require_splits(split, hub.splits, str(path))
    wholes = {}
    for name in names:
        wholes[name] = _make_part(path, name, hub.files[name])
        wanted = hub.num_rows.get(name)
        count = wanted if wanted is None else Split((wholes[name],)).count_rows()
        if count != wanted:
            raise UnreadableError(
                f"split {name} has {count} rows, but README.md says {wanted}: files are missing, "
                "or README.md is of other ones; fetch the whole folder, or mend README.md"
            )
    return _cut_parts(wholes, split, str(path))


def _make_part(path: Path, split: str, files: Sequence[Path]) -> Part:
    """Choose the reader of a split's files; those that cannot hold rows, such as LICENSE, are left.

    Raises:
        UnreadableError: none of the files holds rows, they are of several formats or of one that is
            not read, or shards are missing.
    """
    chosen, readers = [], {}
    for file in files:
        reader = find_reader(file)
        if reader is not None:
            chosen.append(file)
            readers.setdefault(reader, file.name)
        elif file.suffix.lower() in UNREAD:
            remedy = "convert it, or move it away"
            if file.suffix.lower() == ".tsv":
                remedy += "; of GLUE's own files, set task.name or data.config to the task"
            if not file.is_file():  # on the hub alone
                remedy = "fetch the data set into a folder of your own, and convert it there"
            raise UnreadableError(
                f"{file} is among the files of split {split}, and is none of {ENDINGS}; {remedy}"
            )
    if not chosen:
        raise UnreadableError(f"{path} has no files of split {split} in {ENDINGS}")
    if len(readers) > 1:
        raise UnreadableError(
            f"the files of split {split} in {path} have several formats "
            f"({', '.join(readers.values())}); keep those of one, or give one file as data.path"
        )
    require_whole_shards(chosen)
    return Part(tuple(chosen), next(iter(readers)))


def require_whole_shards(files: Sequence[Path]) -> None:
    """Raise UnreadableError if files named `-00001-of-00003` are not a whole set of shards."""
    sets: dict[tuple[Path, str], dict[int, list[int]]] = {}
    for file in files:
        match = _SHARD.match(file.name)
        if match:
            totals = sets.setdefault((file.parent, match["name"]), {})
            totals.setdefault(int(match["total"]), []).append(int(match["index"]))
    for (folder, name), totals in sets.items():
        if len(totals) > 1:
            counts = " and ".join(map(str, sorted(totals)))
            raise UnreadableError(
                f"{folder / name}...: shards of {counts} files lie together; remove the older ones"
            )
        [(total, indices)] = totals.items()
        first = 0 if 0 in indices else 1
        if sorted(indices) != list(range(first, first + total)):
            raise UnreadableError(
                f"{folder / name}...: {len(indices)} of the {total} shards that their names speak "
                "of are there, or one is there twice; fetch all of them"
            )
