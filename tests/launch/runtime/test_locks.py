"""A lock file keeps others out until it is let go. An output folder's lock:
tests/launch/run/test_folder.py.

Needs nothing. Takes 1 s.
"""

import errno
import fcntl
import threading
import time
from pathlib import Path

import pytest

from launch.runtime.locks import FolderLock, hold_lock


def test_one_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    inside, most = [], []

    def enter() -> None:
        with hold_lock(tmp_path / "lock"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_a_file_system_without_locks_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold_lock(tmp_path / "lock"):
        pass
    warning = f"warning: {tmp_path} is on a file system without locks; "
    remedy = "fill it from one node at a time, or set ASTRA_CACHE to a folder on a local disk\n"
    assert capsys.readouterr().out == warning + remedy
    FolderLock(tmp_path).acquire()
    assert capsys.readouterr().out == f"{warning}start this run only once\n"


def test_another_error_of_the_file_system_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="broken"), hold_lock(tmp_path / "lock"):
        pass
    with pytest.raises(OSError, match="broken"):
        FolderLock(tmp_path).acquire()
