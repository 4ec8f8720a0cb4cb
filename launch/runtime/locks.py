"""Lock files: one that is waited for, and an output folder's, which a process keeps to its end."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from launch.runtime.errors import UserError

WAIT = 30.0  # seconds that `FolderLock.acquire` waits for the process before it to end
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of a file system without locks


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, and wait for it first while another process or thread holds it.

    On a file system without locks nothing is held, and a warning says so.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"warning: {path.parent} is on a file system without locks; fill it from one node at a "
                "time, or set ASTRA_CACHE to a folder on a local disk",
                flush=True,
            )
        yield


class FolderLock:
    """The lock of an output folder, so that one process at a time writes to it.

    Whoever acquires it keeps this object for as long as the folder is in use. The open file holds
    the lock; the kernel frees it when the process is gone, however it ended. Of a machine that is
    gone a file server may keep it: NFS 4 for its lease, 90 s by default, NFS 3 until the machine is
    back.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Lock the folder's file `lock`. On a file system without locks, print a warning instead.

        Raises:
            UserError: another process has kept the lock for WAIT seconds.
        """
        self._file = (self.folder / "lock").open("a+")
        deadline = time.monotonic() + WAIT
        told = False
        while not self._try_to_lock():
            self._file.seek(0)
            holder = self._file.read().strip()
            if time.monotonic() > deadline:
                raise UserError(
                    f"--output: {self.folder} is in use by {holder}; stop that run or choose "
                    f"another folder; if that machine is gone, delete {self._file.name}"
                )
            if not told:
                print(
                    f"{self.folder} is in use by {holder}; waiting up to {WAIT:.0f} s for it to "
                    "end",
                    flush=True,
                )
                told = True
            time.sleep(1)
        self._file.truncate(0)
        self._file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n")
        self._file.flush()

    def _try_to_lock(self) -> bool:
        """Return whether this process may use the folder now."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"warning: {self.folder} is on a file system without locks; start this run only "
                "once",
                flush=True,
            )
        return True
