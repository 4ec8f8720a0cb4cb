"""Files that are whole or absent, whatever happens while they are written."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path


def cache_root() -> Path:
    """Where what any run can use again is kept: $ASTRA_CACHE, or ~/.cache/astra-recipes."""
    return Path(os.environ.get("ASTRA_CACHE", "~/.cache/astra-recipes")).expanduser()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, once whoever holds it is done or gone; a file system may have no locks."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        yield


def write_json(path: Path, value: dict) -> None:
    """Indented JSON; see write_text."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Written beside, flushed to the disk, and renamed. Raises OSError."""
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def sync(path: Path) -> None:
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
