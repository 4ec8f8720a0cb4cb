"""A model's files: found by hub id or local folder, and hashed."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import tqdm as hub_bar
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from astra.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from launch.runtime import watchdog
from launch.runtime.errors import UserError, read_first_line
from launch.runtime.files import cache_root, hash_file, read_blob_name
from launch.runtime.shortages import is_full_disk

WEIGHT_FILES = "*.safetensors"
# Files in a model's folder that decide its tokenizer, besides config.json.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.codes",
    "tekken.json",
    "*.model",
)
# That are fetched from the hub; *.jinja are chat templates, some in a folder of their own.
FILES = [WEIGHT_FILES, "*.json", *TOKENIZER_FILES, "*.jinja"]
# Of them, those that are not read: other formats' copies in folders, and Mistral's of the weights.
OTHER_FILES = ["*/*.safetensors", "*/*.json", "*/*.model", "consolidated*.safetensors"]
NO_FOLDER_REMEDY = "correct the path, or give a hub id"
RECENT = 2 * 10**9  # nanoseconds; a file system's clock may be as coarse as this


def is_hub_id(name: str) -> bool:
    """Return whether `name` has the form of a hub id, `name` or `owner/name`, and not of a path."""
    return name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def locate_base(name: str, revision: str | None, verified: bool) -> tuple[str, str | None]:
    """Return a base's name and commit as commands in any folder take them.

    Args:
        name: hub id or local folder. A relative path would elsewhere be taken for a hub id.
        revision: that the run recorded.
        verified: whether `revision` is a commit of the hub.

    Returns:
        Hub id and commit, if that is known; or a folder's whole path and None.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder.resolve()), None
    return name, revision if verified else None


def fetch_model(
    name: str,
    revision: str,
    weights: bool = True,
    field: str = "model.name",
    remedy: str = NO_FOLDER_REMEDY,
) -> Path:
    """Return the local folder of model `name`.

    It is the folder itself, or the hub's files, downloaded or from the hub's cache. What it holds
    is checked by launch.models.check.

    Args:
        name: hub id or local folder.
        revision: branch, tag or commit on the hub.
        weights: whether the weights are wanted too; without them, the config and the tokenizer.
        field: what a message begins with, the recipe field or option that names the model.
        remedy: what to do where `name` is the path of a folder that is not there.

    Raises:
        UserError: no such folder or model, the hub is not reachable, or there is no config.json.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not is_hub_id(name):
            raise UserError(f"{field}: no folder {name}; {remedy}")
        patterns = FILES if weights else FILES[1:]
        folder = download("model", name, revision, field, patterns, OTHER_FILES)
    if not (folder / "config.json").is_file():
        raise UserError(f"{field}: {folder} has no config.json; give a model's folder")
    return folder


class _BeatingBar(hub_bar):
    """A bar of a download, whose progress counts as that of the run."""

    def update(self, n: float | None = 1) -> bool | None:
        """Count `n` bytes or files, and a heartbeat."""
        watchdog.heartbeat()
        return super().update(n)


def download(
    kind: Literal["model", "dataset"],
    name: str,
    revision: str,
    field: str,
    patterns: list[str],
    ignored: list[str] | None = None,
) -> Path:
    """Return the folder of a model or data set in the hub's cache, with the files that match in it.

    Args:
        field: what a message begins with, the recipe field or option that names it.
        patterns: of the files' names; `*` also matches a slash.
        ignored: of files that are left out though they match.

    Raises:
        UserError: there is no such model or data set, or the hub is not reachable.
        OSError: the disk is full.
    """
    try:
        folder = snapshot_download(
            name,
            repo_type=kind,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=ignored,
            tqdm_class=_BeatingBar,
        )
    except LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, HfHubHTTPError):  # the hub answers, with a refusal
            raise _make_hub_error(field, name, revision, error.__cause__) from None
        raise UserError(
            f"{field}: the hub cannot be reached, and its cache lacks files of {name} (revision "
            f"{revision}); check the name, start once with a network, or give a local folder"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        if is_full_disk(error):
            raise
        raise _make_hub_error(field, name, revision, error) from None
    return Path(folder)


def _make_hub_error(field: str, name: str, revision: str, error: Exception) -> UserError:
    """Make the error of a model or data set that the hub does not give."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    return UserError(
        f"{field}: cannot get {name} (revision {revision}) from the hub; check the name and the "
        f"network, log in if it is gated or private, or give a local folder ({reason})"
    )


def fetch_config(name: str, revision: str) -> PretrainedConfig:
    """Return the config of a model, without its other files.

    Args:
        name: hub id or local folder.
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: there is no such folder or model, or the hub is not reachable.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() and not is_hub_id(name):
        raise UserError(f"model.name: no folder {name}; {NO_FOLDER_REMEDY}")
    try:
        return AutoConfig.from_pretrained(folder if folder.is_dir() else name, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.name: cannot get the config of {name}: {read_first_line(error)}"
        ) from None


def load_tokenizer(folder: Path, needs_end: bool = True) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a model's folder.

    Args:
        needs_end: whether it must have an end-of-sequence token, as for generating text.

    Raises:
        UserError: there is none, or it has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.name: cannot load the tokenizer in {folder}: {str(error)[:200]}"
        ) from None
    if needs_end and tokenizer.eos_token_id is None:
        raise UserError(
            f"model.name: the tokenizer in {folder} has no end-of-sequence token; set one"
        )
    return tokenizer


def hash_weights(files: Iterable[Path]) -> str:
    """Return the SHA-256 over the names and SHA-256 sums of the files that hold a model's weights.

    Args:
        files: those that are read, `CheckedModel.files`, and no others beside them.
    """
    return hash_files(files)


def hash_adapter(folder: Path) -> str:
    """Return the SHA-256 over the names and SHA-256 sums of an adapter's files.

    They are its values and, where this project did not write it, its config, as in earlier
    versions; launch.models.identity hashes the config of all of them. PEFT reads the .bin file only
    where there is no other.
    """
    paths = [path for name in ADAPTER_WEIGHTS if (path := folder / name).is_file()][:1]
    if not (folder / "base.json").is_file():
        paths.append(folder / ADAPTER_CONFIG)
    return hash_files(paths)


def hash_files(paths: Iterable[Path]) -> str:
    """Return the SHA-256 over the names and SHA-256 sums of files, sorted by path."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(f"{path.name} {hash_unchanged_file(path)}\n".encode())
    return total.hexdigest()


def hash_unchanged_file(path: Path) -> str:
    """Return the SHA-256 of a file; read the file only if it has changed since the last call.

    Every start of a run needs the hash of its base, which for 70B parameters is 140 GB. Hashes are
    kept in the cache folder. A file is unchanged if its absolute path, inode, size and times of
    change are the same. Each state of a file has a cache entry of its own, so nodes that share the
    cache folder need no lock. Where the cache cannot be read or written, the file is read.
    """
    if read_blob_name(path) is not None:
        return hash_file(path)
    state = _read_state(path)
    entry = cache_root() / "hashes" / f"{_hash_text(json.dumps(state))}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(entry.read_text(encoding="utf-8"))
        if known["state"] == state:
            return known["sha256"]
    began = time.time_ns()
    sha256 = hash_file(path)
    # A file that was written moments ago may be written again within a tick of the clock.
    settled = began - max(state["mtime_ns"], state["ctime_ns"]) > RECENT
    if settled and _read_state(path) == state:
        with contextlib.suppress(OSError):
            _write_entry(entry, {"state": state, "sha256": sha256})
    return sha256


def _read_state(path: Path) -> dict[str, str | int]:
    """Return what changes when a file's content does."""
    status = path.stat()
    return {
        "path": str(path.absolute()),
        "inode": status.st_ino,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,  # a tool can set mtime back, but not this
    }


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _write_entry(path: Path, entry: dict) -> None:
    """Write a cache entry, whole or not at all; several processes may do so at once.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(entry, file)
        os.replace(aside, path)
    except OSError:
        os.unlink(aside)
        raise


def find_commit(folder: Path) -> str | None:
    """Return the hub commit of a folder in the hub's cache; None for any other folder."""
    is_snapshot = folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name)
    return folder.name if is_snapshot else None
