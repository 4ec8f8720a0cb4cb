"""Where a model's files are, and what they are: a hub id or a local folder, and the hash of its weights."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from launch.runtime.errors import UserError

FILES = ["*.safetensors", "*.json", "*.model", "*.txt"]


# What decides a tokenizer, in the folder of a model: its own files, and config.json, which may name its class.
TOKENIZER_FILES = [
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
]


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a hub id, `name` or `owner/name`, and not of a path."""
    is_file = name.endswith((".json", ".jsonl", ".parquet", ".gz"))
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not is_file


def fetch_model(name: str, revision: str, weights: bool = True) -> Path:
    """The local folder of model `name`: the folder itself, or the hub's files, downloaded or from the cache.

    Args:
        weights: whether the weights are wanted too; without them, the config and the tokenizer.

    Raises:
        UserError: no such folder or model, the hub is not reachable, or there are no safetensors weights.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not is_hub_id(name):
            raise UserError(f"model.name: no folder {name}")
        try:
            folder = Path(
                snapshot_download(
                    name, revision=revision, allow_patterns=FILES if weights else FILES[1:]
                )
            )
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise UserError(
                f"model.name: cannot get {name} (revision {revision}) from the hub ({type(error).__name__}); check the "
                "name and the network, log in if the model is gated, or give a local folder"
            ) from None
    if not (folder / "config.json").is_file() or (
        weights and not list(folder.glob("*.safetensors"))
    ):
        raise UserError(f"model.name: {folder} needs a config.json and *.safetensors weights")
    return folder


def fetch_config(name: str, revision: str) -> PretrainedConfig:
    """The config of model `name`, a local folder or hub id, and nothing else of it. Raises UserError."""
    folder = Path(name).expanduser()
    if not folder.is_dir() and not is_hub_id(name):
        raise UserError(f"model.name: no folder {name}")
    try:
        return AutoConfig.from_pretrained(folder if folder.is_dir() else name, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.name: cannot get the config of {name}: {str(error).splitlines()[0]}"
        ) from None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder. Raises UserError if there is none, or it has no end-of-sequence token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.name: cannot load the tokenizer in {folder}: {str(error)[:200]}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.name: the tokenizer in {folder} has no end-of-sequence token; set one"
        )
    return tokenizer


def weights_hash(folder: Path) -> str:
    """SHA-256 over the names and SHA-256 sums of a model's safetensors files."""
    return _files_hash(folder.glob("*.safetensors"))


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 of the names and contents of a model folder's tokenizer files."""
    return _files_hash(
        {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
    )


def _files_hash(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(f"{path.name} {file_hash(path)}\n".encode())
    return total.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    # In the hub's cache a snapshot links to a blob that is named by the file's own SHA-256.
    if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", path.resolve().name):
        return path.resolve().name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit_of(folder: Path) -> str | None:
    """The hub commit of a folder in the hub's cache, or None for any other: no hash is invented."""
    return (
        folder.name
        if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name)
        else None
    )
