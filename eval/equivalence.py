"""Decide whether two answers are mathematically equal, in a worker process with a time limit."""

import atexit
import json
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

from eval.answers.compare import UndecidedError, are_equal
from eval.answers.parse import Node

TIMEOUT = 8.0  # seconds for one comparison
START_TIMEOUT = 60.0  # seconds for a worker to load its libraries

# Each thread has its own worker, so no question waits for another thread's slow one.
_of_thread = threading.local()
_workers: list[subprocess.Popen] = []  # of all threads, to be killed when the process ends
_lock = threading.Lock()


def are_equivalent(
    answer: str, reference: str, timeout: float = TIMEOUT, *, word_problem: bool = False
) -> bool:
    """Return whether `answer` states the same as `reference`, proved within `timeout` seconds.

    May be called in any thread or process. Each thread has a worker process, which stays for the
    next question. A worker that is late is killed, and the answer is then False.

    Raises:
        RuntimeError: the worker does not start.
    """
    try:
        return are_equal(answer, reference, _leave_undecided, word_problem=word_problem)
    except UndecidedError:
        pass
    worker = getattr(_of_thread, "worker", None)
    if worker is None or worker.poll() is not None:
        worker = _of_thread.worker = _start_worker()
    worker.stdin.write(json.dumps([answer, reference, word_problem]) + "\n")
    worker.stdin.flush()
    line = _read_line(worker, timeout)
    if line is None:
        worker.kill()
        worker.wait()
        return False
    return json.loads(line)


def _leave_undecided(given: Node, wanted: Node) -> bool:
    raise UndecidedError


def _start_worker() -> subprocess.Popen:
    worker = subprocess.Popen(
        [sys.executable, "-m", "eval.math_worker"],
        cwd=Path(__file__).resolve().parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with _lock:
        if not _workers:
            atexit.register(_stop_workers)
        running = [other for other in _workers if other.poll() is None]
        _workers[:] = [*running, worker]
    # A first question, because only its answer shows that the libraries are loaded.
    worker.stdin.write(json.dumps(["1", "1", False]) + "\n")
    worker.stdin.flush()
    if _read_line(worker, START_TIMEOUT) is None:
        worker.kill()
        raise RuntimeError("math-verify did not start; pip install -r requirements.txt")
    return worker


def _read_line(worker: subprocess.Popen, timeout: float) -> str | None:
    """Return one line from the worker, or None if none comes in time or the worker has ended."""
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        if select.select([worker.stdout], [], [], left)[0]:
            return worker.stdout.readline() or None
    return None


def _stop_workers() -> None:
    for worker in _workers:
        worker.kill()
        worker.wait()
