"""A run's folder: one run, started once at a time, and what has become of it."""

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from launch.config.schema import Recipe, difference, read, to_yaml
from launch.runtime.errors import UserError
from launch.runtime.files import write_json, write_text

WAIT = 30.0  # seconds for which a start waits for the run before it to end
# Fields that may change when a run goes on: they change neither its losses nor its subspaces, beyond rounding.
FREE_TO_CHANGE = (
    "engine",
    "eval",
    "data.prepared",  # the tokens themselves are compared
    "data.on_bad_row",
    "tracking",
    "model.attention",
    "data.packing",
    "train.micro_batch",
    "train.gradient_checkpointing",
    "train.compile",
    "train.liger",
    "train.checkpoint_every",
    "train.keep",
    "calibration.memory_gib",
)


def open_run(folder: Path, recipe: Recipe) -> bool:
    """Make and lock the run folder and write recipe.yaml; True if the folder already holds this very run, finished.

    The lock is this process's and ends with it.

    Raises:
        UserError: the folder holds another run or other files, another start uses it, or it cannot be written.
    """
    make_folder(folder)
    recipe_path = folder / "recipe.yaml"
    if not recipe_path.is_file() and any(path.name != "lock" for path in folder.iterdir()):
        raise UserError(f"--output: {folder} holds other files; choose an empty or new folder")
    lock(folder / "lock")
    if recipe_path.is_file():
        finished = (folder / "results.json").is_file()
        field = difference(read(str(recipe_path), []), recipe, () if finished else FREE_TO_CHANGE)
        if field:
            state = "a finished" if finished else "an unfinished"
            raise UserError(
                f"--output: {folder} holds {state} run with another {field}; choose another folder"
            )
        if finished:
            write_state(folder, "finished")
            return True
    write_text(recipe_path, to_yaml(recipe))
    write_state(folder, "running")
    return False


def write_state(folder: Path, state: str) -> None:
    """state.json: `running`, `preempted` (asked to stop; start it again), `error` (something to mend), `diverged` or
    `finished`."""
    write_json(
        folder / "state.json", {"state": state, "host": socket.gethostname(), "pid": os.getpid()}
    )


def make_folder(folder: Path) -> None:
    """Make an output folder, if need be. Raises UserError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output: cannot write {folder}: {error.strerror}") from None


_held: list[
    IO
] = []  # an open file holds its lock; the kernel, or the file server, frees it when the process is gone


def lock(path: Path) -> None:
    """Hold the lock file `path` until this process ends. Raises UserError if another one keeps it."""
    file = path.open("a+")
    deadline = time.monotonic() + WAIT
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            if time.monotonic() > deadline:
                raise UserError(
                    f"--output: {path.parent} is in use by {holder}; stop that run or choose another folder"
                ) from None
            if deadline - time.monotonic() > WAIT - 1:
                print(
                    f"{path.parent} is in use by {holder}; waiting up to {WAIT:.0f} s for it to end",
                    flush=True,
                )
            time.sleep(1)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            print(
                f"warning: {path.parent} is on a file system without locks; start this run only once",
                flush=True,
            )
            break
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n")
    file.flush()
    _held.append(file)
