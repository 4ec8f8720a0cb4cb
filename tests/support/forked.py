"""Launch ranks as forks of a process that has already imported the libraries.

Importing takes most of a small launch's time, 6 s a rank; here it happens once for all launches of
a test process. For tests that are not about a launcher.
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
TIME_LIMIT = 540  # seconds


def start_server() -> None:
    """Start the process that is forked for each rank, with the present environment."""
    FORKS.set_forkserver_preload(["tests.support.preloaded"])
    forkserver.ensure_running()


def launch(
    script: Path, arguments: Sequence[str], world_size: int, folder: Path, output: Path
) -> subprocess.CompletedProcess:
    """Run a script on `world_size` ranks.

    Like a launcher, end the other ranks once one has failed.

    Args:
        folder: working folder of the ranks.
        output: folder that takes what they print, in the files stdout and stderr.

    Returns:
        The finished command, with the exit code of the first rank that failed.

    Raises:
        subprocess.TimeoutExpired: a rank still runs after `TIME_LIMIT`; all have been killed.
    """
    processes = _start_ranks(script, arguments, world_size, folder, output)
    exit_code, deadline = 0, time.monotonic() + TIME_LIMIT
    while running := [process for process in processes if process.exitcode is None]:
        sentinels = [process.sentinel for process in running]
        if not connection.wait(sentinels, deadline - time.monotonic()):
            for process in running:
                process.kill()
            printed = (output / "stdout").read_text()
            raise subprocess.TimeoutExpired([script, *arguments], TIME_LIMIT, printed)
        if not exit_code:
            exit_code = _find_failure(processes)
            if exit_code:
                for process in running:
                    process.terminate()
    exit_code = exit_code or _find_failure(processes)  # one may have ended after the last look
    printed, errors = ((output / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess([script, *arguments], exit_code, printed, errors)


def _start_ranks(
    script: Path, arguments: Sequence[str], world_size: int, folder: Path, output: Path
) -> list[BaseProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
    }
    processes = []
    for rank in range(world_size):
        variables = group | {"RANK": rank, "LOCAL_RANK": rank} if world_size > 1 else {}
        rank_arguments = (script, arguments, variables, folder, output)
        process = FORKS.Process(target=_become_rank, args=rank_arguments)
        process.start()
        processes.append(process)
    return processes


def _find_failure(processes: Sequence[BaseProcess]) -> int:
    """Return the exit code of the first process that has failed, or 0."""
    return next((process.exitcode for process in processes if process.exitcode), 0)


def _become_rank(
    script: Path,
    arguments: Sequence[str],
    variables: dict[str, object],
    folder: Path,
    output: Path,
) -> None:
    """Turn this fork into the rank that a launcher would have started, and run the script."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.chdir(folder)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
