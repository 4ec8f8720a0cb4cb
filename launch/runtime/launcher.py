"""The launcher that started this rank: deepspeed, torchrun or none; and whether it still runs."""

import contextlib
import os
import stat
import sys

import psutil

LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run")  # parts of their command lines


def find_launchers() -> list[psutil.Process]:
    """Return the launcher's processes above this one.

    There are none under plain python and srun; Slurm ends its tasks itself.
    """
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            if not any(name in part for part in process.cmdline()[:4] for name in LAUNCHERS):
                break
            found.append(process)
    return found


def is_alive(process: psutil.Process) -> bool:
    """Return whether `process` still runs. A zombie has ended, though nobody has waited for it."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def was_orphaned(launchers: list[psutil.Process]) -> bool:
    """Return whether the launcher was gone before `find_launchers` looked for it."""
    with contextlib.suppress(psutil.Error):
        if launchers:  # `deepspeed` starts its launch module, which starts the ranks
            top = launchers[-1]
            return "deepspeed.launcher.launch" in top.cmdline() and top.ppid() == 1
        by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        by_deepspeed = any(word.startswith("--local_rank") for word in sys.argv)
        return (by_torchrun or by_deepspeed) and os.getppid() == 1
    return False


def close_pipes() -> None:
    """Discard further output: nobody reads the launcher's pipe any more, and writing would fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            os.dup2(null, descriptor)
