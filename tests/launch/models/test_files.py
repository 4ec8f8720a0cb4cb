"""A model's files are hashed once, and again when they have changed.

Needs nothing. Takes 2 s.
"""

import hashlib
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.models import files as model_files
from launch.models.files import hash_unchanged_file, hash_weights
from launch.models.identity import hash_tokenizer
from launch.runtime import files
from launch.runtime.files import hash_file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("ASTRA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hashes"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read to be hashed, in this order."""
    paths: list[Path] = []

    def count_and_hash(path: Path) -> str:
        paths.append(path)
        return hash_file(path)

    monkeypatch.setattr(model_files, "hash_file", count_and_hash)
    return paths


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the test were written a minute ago."""
    now = time.time_ns
    monkeypatch.setattr(model_files.time, "time_ns", lambda: now() + 60 * 10**9)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.usefixtures("later")
def test_an_unchanged_file_is_read_once(tmp_path: Path, reads: list[Path], cache: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    for _ in range(3):
        assert hash_unchanged_file(path) == sha256(b"weights")
    assert reads == [path]
    assert len(list(cache.iterdir())) == 1


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("restore_time", [False, True], ids=["new time", "old time"])
def test_a_file_that_is_changed_within_its_size_is_read_again(
    tmp_path: Path, restore_time: bool
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    before = path.stat()
    assert hash_unchanged_file(path) == sha256(b"weights")
    time.sleep(0.01)  # the tick of a file system's clock
    with path.open("r+b") as file:
        file.write(b"W")
    if restore_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)
    assert hash_unchanged_file(path) == sha256(b"Weights")


def test_a_file_that_was_just_written_is_not_remembered(
    tmp_path: Path, reads: list[Path], cache: Path
) -> None:
    """It may be written to again within one tick of the file system's clock."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    hash_unchanged_file(path)
    hash_unchanged_file(path)
    assert reads == [path, path]
    assert not cache.exists()


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"state": 1}'])
def test_a_damaged_entry_is_replaced(tmp_path: Path, cache: Path, damage: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    hash_unchanged_file(path)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage)
    assert hash_unchanged_file(path) == sha256(b"weights")
    assert entry.read_bytes() == whole


@pytest.mark.usefixtures("later")
def test_without_a_cache_folder_the_file_is_read(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    cache.parent.mkdir()
    cache.write_text("a file in the folder's place")
    assert hash_unchanged_file(path) == sha256(b"weights")


@pytest.mark.usefixtures("later")
def test_processes_may_write_the_same_entry_at_once(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    fork = multiprocessing.get_context("fork")
    with fork.Pool(4) as pool:
        assert set(pool.map(hash_unchanged_file, [path] * 40)) == {sha256(b"weights")}
    assert [entry.suffix for entry in cache.iterdir()] == [".json"]


def test_a_blob_of_the_hubs_cache_is_not_read(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {kind: sha256(kind.encode()) for kind in ("sha256", "xet")}
    stored = tmp_path / "blobs" / names["xet"][:2] / names["xet"]  # of all repositories
    blob = tmp_path / "models--someone--model" / "blobs" / names["sha256"]
    link = blob.parents[1] / "snapshots" / ("0" * 40) / "model.safetensors"
    for path in (stored, blob, link):
        path.parent.mkdir(parents=True)
    stored.write_bytes(b"weights")
    blob.symlink_to(os.path.relpath(stored, blob.parent))
    link.symlink_to(os.path.relpath(blob, link.parent))
    alone = (
        tmp_path / "linked.safetensors"
    )  # no file of the hub's cache, whatever its target is called
    alone.symlink_to(stored)
    assert hash_unchanged_file(alone) == sha256(b"weights")
    monkeypatch.setattr(files.hashlib, "file_digest", None)
    assert hash_unchanged_file(link) == names["sha256"]


@pytest.mark.parametrize(
    ("hash_folder", "name"),
    [
        (lambda folder: hash_weights(folder.glob("*.safetensors")), "model.safetensors"),
        (lambda folder: hash_tokenizer(folder, with_config=True), "tokenizer.json"),
        (lambda folder: hash_tokenizer(folder, with_config=True), "config.json"),
    ],
)
def test_names_and_contents_count(hash_folder: Callable, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"content")
    (tmp_path / "notes.md").write_bytes(b"not hashed")
    line = f"{name} {sha256(b'content')}\n"
    assert hash_folder(tmp_path) == sha256(line.encode())
