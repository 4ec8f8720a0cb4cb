"""Which files hold the rows of a split: a single file, a folder of `save_to_disk`, or the hub's layout.

The hub's layout follows `datasets`' rules: names of files and folders, or `configs` in README.md.
Whatever would leave rows out in silence is refused: a split or configuration that is not there,
shards that are missing, files of another format among those of the split.
"""

import json
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.data.readers import ENDINGS, Reader, UnreadableError, find_reader, read_arrow

if TYPE_CHECKING:  # takes seconds to import
    from huggingface_hub import DatasetCardData

TRAIN = "train"  # the split of a single file, and of a single data set of `save_to_disk`
# What README.md may say of a configuration; `datasets` gives other fields to its own readers.
CONFIG_FIELDS = {"data_files", "data_dir", "default", "description", "version"}
# Endings of files that `datasets` reads rows from, but this program does not.
UNREAD = {".tsv", ".arrow", ".gz", ".zst", ".xz", ".bz2", ".lz4", ".zip", ".tar", ".7z"}
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

    def list_files(self) -> list[Path]:
        """Return the files that are read, each once."""
        return list(dict.fromkeys(file for part in self.parts for file in part.files))

    def iterate_rows(self, fields: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the rows, those of `fields` that they have, or more. Raises UnreadableError."""
        for part in self.parts:
            yield from islice(_iterate_files(part, fields), part.start, part.stop)

    def count_rows(self) -> int:
        """Count the rows by reading them. Raises UnreadableError."""
        return sum(1 for _ in self.iterate_rows(()))


class _Folder(NamedTuple):
    """The splits of a folder in the hub's layout, before any file is looked for."""

    path: Path  # the folder, or the configuration's data_dir in it
    patterns: dict[str, list[str]]  # split -> patterns below `path`
    num_rows: dict[str, int]  # split -> rows that it has according to README.md, where that says so


def _iterate_files(part: Part, fields: Collection[str] | None) -> Iterator[dict[str, Any]]:
    for file in part.files:
        yield from part.read(file, fields)


def find_split(path: Path, split: str, config: str | None) -> Split:
    """Find the rows of a split in a file or folder.

    Args:
        split: as `datasets` spells it: `train`, `train[:10%]`, `train+test[5:]`.
        config: the configuration; None for the only one or the default.

    Raises:
        UnreadableError: there is no such split or configuration; files of it are missing, or are of
            a format that is not read; or the rows of a slice cannot be counted.
    """
    if path.is_file():
        what = f"{path}, a single file,"
        _refuse_config(config, what)
        return _cut_parts({TRAIN: Part((path,), _require_reader(path))}, split, what)
    if _is_saved(path) or (path / "dataset_dict.json").is_file():
        _refuse_config(config, f"{path}, a folder of save_to_disk,")
        return _find_saved_split(path, split)
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
            hint = "; TSV files differ in how they quote: convert it to CSV or JSONL"
        raise UnreadableError(f"{path} is none of {ENDINGS}{hint}")
    if path.stat().st_size == 0:
        raise UnreadableError(f"{path} is empty")
    return reader


def _name_splits(split: str) -> list[str]:
    """Return the names in a split's specification: train and test of `train[:5]+test`."""
    return [re.split(r"[\[(]", piece)[0].strip() for piece in split.split("+")]


def _require_splits(split: str, known: Collection[str], what: str) -> None:
    for name in _name_splits(split):
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
        counts = {name: Split((wholes[name],)).count_rows() for name in _name_splits(split)}
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
    for name in _name_splits(split):
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


def list_data_files(path: Path) -> dict[str, Path]:
    """Return the files that may hold rows, by their names below `path`.

    Of a folder those are all but hidden ones; links to folders are followed.

    Raises:
        UnreadableError: a folder cannot be listed, or a file of rows is a link to nothing.
    """
    if path.is_file():
        return {path.name: path}
    found: dict[Path, Path] = {}
    try:
        _add_files(path, Path(), (), found)
    except OSError as error:
        raise UnreadableError(f"{path} cannot be listed: {error}") from None
    return {str(name): found[name] for name in sorted(found)}


def _add_files(folder: Path, name: Path, above: tuple[Path, ...], found: dict[Path, Path]) -> None:
    """Add the files below `folder`, which is called `name`, to `found`.

    Args:
        above: the real paths of the folders that it lies in, for a link may lead back to one.
    """
    real = folder.resolve()
    if real in above:
        return
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            _add_files(entry, name / entry.name, (*above, real), found)
        elif entry.is_file():
            found[name / entry.name] = entry
        elif _may_hold_rows(entry):  # a part of a copy, or of the hub's cache
            raise UnreadableError(f"{entry} is a link to a file that is missing; fetch it again")


def _may_hold_rows(file: Path) -> bool:
    """Return whether a file's name is that of rows, in a format that is read here or is not."""
    return find_reader(file) is not None or file.suffix.lower() in UNREAD


def _find_hub_split(path: Path, split: str, config: str | None) -> Split:
    """Find a split in a folder of the hub's layout. Raises UnreadableError."""
    import datasets

    with tempfile.TemporaryDirectory(prefix="astra-rows-") as temporary:
        mirror = Path(temporary).resolve() / "rows"
        try:
            links = _mirror_rows(path, mirror)
            folder = _read_folder(path, mirror, config)
            _require_splits(split, folder.patterns, str(path))
            found = {name: _resolve_files(links, folder, name) for name in _name_splits(split)}
        except UnreadableError:
            raise
        except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
            fault = f"{type(error).__name__}: {error}".replace(str(mirror), str(path))
            raise UnreadableError(" ".join(fault.split())[:300]) from None
    wholes = {}
    for name, files in found.items():
        wholes[name] = _make_part(path, name, files)
        wanted = folder.num_rows.get(name)
        count = wanted if wanted is None else Split((wholes[name],)).count_rows()
        if count != wanted:
            raise UnreadableError(
                f"split {name} has {count} rows, but README.md says {wanted}: files are missing, "
                "or README.md is of other ones; fetch the whole folder, or mend README.md"
            )
    return _cut_parts(wholes, split, str(path))


def _mirror_rows(path: Path, mirror: Path) -> dict[Path, Path]:
    """Make in the folder `mirror` links to those files below `path` that may hold rows.

    `datasets` looks for files by patterns. In the mirror neither the folder's own name nor files
    without rows, such as test_notes.txt, mean anything to them.

    Returns:
        Link -> file.
    """
    mirror.mkdir()
    links = {}
    for name, file in list_data_files(path).items():
        if _may_hold_rows(file):
            # fsspec, by which `datasets` finds files, takes :: for a chain of addresses.
            link = mirror / name.replace("::", "--")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
            links[link] = file
    return links


def _read_folder(path: Path, mirror: Path, config: str | None) -> _Folder:
    """Find the splits of a folder, as README.md or else the names of its files say.

    Args:
        mirror: of the files that may hold rows.

    Raises:
        UnreadableError: there is no such configuration, or README.md asks for what is not done here.
        OSError, ValueError, TypeError: README.md cannot be read, or there are no files.
    """
    import datasets
    from datasets.data_files import get_data_patterns, sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs

    if (path / ".huggingface.yaml").is_file():
        raise UnreadableError(".huggingface.yaml is not supported; move it into README.md's header")
    card = _read_card(path / "README.md")
    configs = MetadataConfigs.from_dataset_card_data(card)
    if len(configs) < len(card.get("configs") or ()):
        raise UnreadableError("README.md has two configurations of one name; rename one")
    infos = datasets.info.DatasetInfosDict.from_dataset_card_data(card)
    settings: dict[str, Any] = {}
    if configs:
        config = config or configs.get_default_config_name()
        if config not in configs:
            state = "is missing" if config is None else f"{config!r} is not in README.md"
            raise UnreadableError(f"Config name {state}; set data.config to {' or '.join(configs)}")
        settings = configs[config]
    elif config not in (None, "default"):
        raise UnreadableError(
            f"README.md has no configuration {config!r}, nor any other; set data.config to null"
        )
    unknown = settings.keys() - CONFIG_FIELDS
    if unknown:
        raise UnreadableError(
            f"README.md sets {min(unknown)} for configuration {config}, which is not supported; "
            "give the files themselves as data.path"
        )
    base = mirror / settings["data_dir"] if settings.get("data_dir") else mirror
    if settings.get("data_files") is not None:
        patterns = sanitize_patterns(settings["data_files"])
    else:
        patterns = get_data_patterns(str(base))
    info = infos.get(config or "default")
    sizes = (info.splits or {}) if info is not None else {}
    num_rows = {name: size.num_examples for name, size in sizes.items() if size.num_examples}
    return _Folder(base, {str(name): list(value) for name, value in patterns.items()}, num_rows)


def _read_card(path: Path) -> "DatasetCardData":
    """Read the header of README.md; an empty one where there is no header or no file.

    Raises:
        UnreadableError: the file begins a header that has no end, or is not YAML.
        OSError, ValueError: it cannot be read.
    """
    import yaml
    from huggingface_hub import DatasetCard, DatasetCardData

    if not path.is_file():
        return DatasetCardData()
    text = path.read_text(encoding="utf-8-sig")
    has_header = text.lstrip().startswith("---")
    try:
        card = DatasetCard(text).data if has_header else DatasetCardData()
    except yaml.YAMLError as error:
        fault = " ".join(str(error).split())[:200]
        raise UnreadableError(f"the header of README.md is not YAML: {fault}") from None
    if has_header and not card.to_dict():
        raise UnreadableError("the header of README.md is empty, or has no second line of ---")
    return card


def _resolve_files(links: Mapping[Path, Path], folder: _Folder, split: str) -> list[Path]:
    """Return the files of a split, each once, in `datasets`' order.

    Args:
        links: see `_mirror_rows`.

    Raises:
        UnreadableError: a pattern leads out of the folder.
        OSError: a file that README.md names is not there.
    """
    from datasets.data_files import DataFilesList

    patterns = folder.patterns[split]
    found = []
    if not any("://" in pattern or "::" in pattern for pattern in patterns):  # not an address
        found = [Path(f) for f in DataFilesList.from_patterns(patterns, str(folder.path))]
    if not found or not links.keys() >= set(found):
        raise UnreadableError(
            f"README.md names files ({patterns[0]}) that are not in the folder; put them there"
        )
    return [links[link] for link in dict.fromkeys(found)]


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
            raise UnreadableError(
                f"{file} is among the files of split {split}, and is none of {ENDINGS}; "
                "convert it, or move it away"
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
