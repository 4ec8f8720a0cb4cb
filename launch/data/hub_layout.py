"""The hub's layout: which files of a folder belong to which split, by `datasets`' own rules.

Those are the names of files and folders, or `configs` in the header of README.md. What README.md
asks for and this program does not do is refused.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from huggingface_hub import get_cached_repo_tree
from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError

from launch.data.readers import UnreadableError, find_reader
from launch.models.files import find_commit

if TYPE_CHECKING:  # takes seconds to import
    from huggingface_hub import DatasetCardData

# What README.md may say of a configuration; `datasets` gives other fields to its own readers.
CONFIG_FIELDS = {"data_files", "data_dir", "default", "description", "version"}
# Endings of files that `datasets` reads rows from, but this program does not.
UNREAD = {".tsv", ".arrow", ".gz", ".zst", ".xz", ".bz2", ".lz4", ".zip", ".tar", ".7z"}


class HubFiles(NamedTuple):
    """The files of some splits of a folder."""

    splits: list[str]  # names of all splits that there are
    files: dict[str, list[Path]]  # split -> its files, of the splits asked for that there are
    num_rows: dict[str, int]  # split -> rows that it has according to README.md, where that says so


class _Folder(NamedTuple):
    """The splits of a folder in the hub's layout, before any file is looked for."""

    path: Path  # the folder, or the configuration's data_dir in it
    patterns: dict[str, list[str]]  # split -> patterns below `path`
    num_rows: dict[str, int]  # split -> rows that it has according to README.md, where that says so


def find_hub_files(path: Path, names: Sequence[str], config: str | None) -> HubFiles:
    """Find the files of the splits `names` in a folder.

    Args:
        config: the configuration; None for the only one or the default.

    Raises:
        UnreadableError: there are no files or no such configuration, or README.md is wrong or asks
            for what is not done here.
    """
    import datasets

    with tempfile.TemporaryDirectory(prefix="astra-rows-") as temporary:
        mirror = Path(temporary).resolve() / "rows"
        try:
            links = _mirror_rows(path, mirror)
            folder = _read_folder(path, mirror, config)
            known = [name for name in names if name in folder.patterns]
            found = {name: _resolve_files(links, folder, name) for name in known}
        except UnreadableError:
            raise
        except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
            fault = f"{type(error).__name__}: {error}".replace(str(mirror), str(path))
            raise UnreadableError(" ".join(fault.split())[:300]) from None
    return HubFiles(list(folder.patterns), found, folder.num_rows)


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


def list_hub_names(path: Path) -> list[Path]:
    """Return the names of a data set's files, without hidden ones, of a folder in the hub's cache.

    An empty list for other folders, and where the cache has no list of them: `snapshot_download`
    leaves one there, whatever it fetches; programs that fetch single files leave none.
    """
    commit = find_commit(path)
    if commit is None:
        return []
    cached = path.absolute().parents[1]  # datasets--OWNER--NAME/snapshots/COMMIT
    repository = cached.name.removeprefix("datasets--").replace("--", "/")
    try:
        files = get_cached_repo_tree(
            repository, repo_type="dataset", revision=commit, cache_dir=cached.parent
        )
    except (CachedRepoTreeNotFoundError, HFValidationError):
        return []
    names = [Path(file.path) for file in files]
    return [name for name in names if not any(part.startswith(".") for part in name.parts)]


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


def _mirror_rows(path: Path, mirror: Path) -> dict[Path, Path]:
    """Make in the folder `mirror` links to those files below `path` that may hold rows.

    Files that are on the hub alone have an empty file there instead: they may belong to a split.

    `datasets` looks for files by patterns. In the mirror neither the folder's own name nor files
    without rows, such as test_notes.txt, mean anything to them.

    Returns:
        Link -> file.
    """
    mirror.mkdir()
    links = {}
    on_hub = {str(name): path / name for name in list_hub_names(path)}
    for name, file in (on_hub | list_data_files(path)).items():
        if _may_hold_rows(file):
            # fsspec, by which `datasets` finds files, takes :: for a chain of addresses.
            link = mirror / name.replace("::", "--")
            link.parent.mkdir(parents=True, exist_ok=True)
            if file.is_file():
                link.symlink_to(file.resolve())
            else:
                link.touch()
            links[link] = file
    return links


def _read_folder(path: Path, mirror: Path, config: str | None) -> _Folder:
    """Find the splits of a folder, as README.md or else the names of its files say.

    Args:
        mirror: of the files that may hold rows.

    Raises:
        UnreadableError: there is no such configuration, or README.md asks for what is not done.
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
