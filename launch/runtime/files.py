"""Files that are whole or absent, whatever happens while they are written; their hashes."""

import hashlib
import json
import os
import re
from pathlib import Path


def cache_root() -> Path:
    """Return the folder of what any run can use again: $ASTRA_CACHE, or ~/.cache/astra-recipes."""
    return Path(os.environ.get("ASTRA_CACHE", "~/.cache/astra-recipes")).expanduser()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits.

    The file is read, unless it is one of the hub's cache (see `read_blob_name`).
    """
    known = read_blob_name(path)
    if known is not None:
        return known
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_blob_name(path: Path) -> str | None:
    """Return the SHA-256 of a file in the hub's cache from its name; None for any other file.

    A snapshot there links to a blob of the same repository, which is named by its own SHA-256. That
    may link on to a store of all repositories, whose names are hashes of another kind (Xet's); see
    huggingface_hub/utils/_shared_blobs.py.
    """
    if not path.is_symlink():
        return None
    blob = path.parent / os.readlink(path)
    is_named = blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name)
    return blob.name if is_named else None


def write_json(path: Path, value: dict) -> None:
    """Write `value` as indented JSON, whole or not at all. Raises OSError."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` beside `path`, flush it to the disk, and rename it. Raises OSError."""
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Flush a written file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries (renames) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
