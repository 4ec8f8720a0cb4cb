"""What decides a model's responses besides its weights, as hashes, and how records of it compare."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

from astra.adapter import ADAPTER_CONFIG
from launch.models.files import TOKENIZER_FILES, hash_files
from launch.runtime.files import hash_file

# Fields, at any depth, that decide nothing here: the recipe or the command chooses the dtype.
CONFIG_NOTES = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache")
ADAPTER_NOTES = (
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "inference_mode",
)
# Keys that records of earlier versions lack. They are compared where both sides have them.
LATER_KEYS = (
    "config_sha256",
    "tokenizer_sha256",
    "adapter_config_sha256",
    "astra_init_sha256",
    "astra_init_config_sha256",
    "end_tokens",
)


def hash_config(folder: Path) -> str:
    """Return the SHA-256 of a model's config.json, normalised and without CONFIG_NOTES."""
    return _hash_json(folder / "config.json", CONFIG_NOTES)


def hash_adapter_config(folder: Path) -> str:
    """Return the SHA-256 of an adapter_config.json, normalised and without ADAPTER_NOTES."""
    return _hash_json(folder / ADAPTER_CONFIG, ADAPTER_NOTES)


def hash_tokenizer(folder: Path, with_config: bool) -> str:
    """Return the SHA-256 over the names and SHA-256 sums of a model folder's tokenizer files.

    Args:
        with_config: whether config.json, which may name the tokenizer's class, is one of them, byte
            by byte. Records that have `hash_config` too leave it out.
    """
    paths: set[Path] = {folder / "config.json"} if with_config else set()
    for pattern in TOKENIZER_FILES:
        paths |= set(folder.glob(pattern))
    return hash_files(path for path in paths if path.is_file())


def records_agree(found: object, wanted: object) -> bool:
    """Return whether two records, as JSON has them, are equal.

    A key of LATER_KEYS, at any depth, that only one of them has does not count.
    """
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return found == wanted
    alone = found.keys() ^ wanted.keys()
    both = found.keys() & wanted.keys()
    return alone <= set(LATER_KEYS) and all(records_agree(found[k], wanted[k]) for k in both)


def differs(found: str | None, wanted: str | None) -> bool:
    """Return whether two hashes differ, where both sides have one."""
    return None not in (found, wanted) and found != wanted


def _hash_json(path: Path, ignored: Collection[str]) -> str:
    """Return the SHA-256 of a JSON file's values: order, spaces and 1 for 1.0 do not count.

    A file that is not JSON is hashed as it is; whoever reads it says so.
    """
    try:
        # 10000 and 10000.0 are one value to a config.
        values = json.loads(path.read_text(encoding="utf-8"), parse_int=float)
    except ValueError:
        return hash_file(path)
    text = json.dumps(_drop_fields(values, ignored), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _drop_fields(value: object, ignored: Collection[str]) -> object:
    if isinstance(value, list):
        return [_drop_fields(item, ignored) for item in value]
    if isinstance(value, dict):
        kept = (key for key in value if key not in ignored)
        return {key: _drop_fields(value[key], ignored) for key in kept}
    return value
