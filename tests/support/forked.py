"""Launches whose ranks are forks of a process that has imported the libraries already.

Most of a small launch's time goes into imports, 6 s a rank; here once for all launches of a test process. For tests
that are not about a launcher.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Start the process whose forks the ranks are, with this process's environment of now."""
    FORKS.set_forkserver_preload(["tests.support.preloaded"])
    forkserver.ensure_running()


def launch(
    script: Path, arguments: Sequence[str], ranks: int, folder: Path
) -> subprocess.CompletedProcess:
    """Run a script on `ranks` ranks in the working folder `folder`, which also takes what they print.

    As launchers do, it ends the other ranks once one has failed; the return code is the first failed rank's. Raises
    subprocess.TimeoutExpired.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
    }
    processes = []
    for rank in range(ranks):
        place = group | {"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {}
        process = FORKS.Process(target=become, args=(script, arguments, place, folder))
        process.start()
        processes.append(process)
    failed, deadline = 0, time.monotonic() + 540
    while running := [process for process in processes if process.exitcode is None]:
        if not connection.wait(
            [process.sentinel for process in running], deadline - time.monotonic()
        ):
            for process in running:
                process.kill()
            raise subprocess.TimeoutExpired(
                [script, *arguments], 540, (folder / "stdout").read_text()
            )
        if not failed and (failed := first_failed(processes)):
            for process in running:
                process.terminate()
    failed = failed or first_failed(processes)  # one may have ended after the last look
    output, errors = ((folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess([script, *arguments], failed, output, errors)


def first_failed(processes: Sequence[BaseProcess]) -> int:
    """The exit code of the first one that has ended with another than 0, or 0."""
    return next(filter(None, (process.exitcode for process in processes)), 0)


def become(script: Path, arguments: Sequence[str], place: dict[str, object], folder: Path) -> None:
    """In a fork: be the rank that a launcher would have started."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ |= {name: str(value) for name, value in place.items()}
    os.chdir(folder)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
