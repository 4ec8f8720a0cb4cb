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
from eval.sandbox.watch import read_usage

# Seconds of a worker's processor time, so that a loaded machine changes no verdict.
TIMEOUT = 8.0  # for one comparison
START_TIMEOUT = 60.0  # to load its libraries
WALL = 10  # times these, by the clock
POLL = 0.1  # seconds between two looks at the processor time

# Each thread has its own worker, so no question waits for another thread's slow one.
_of_thread = threading.local()
_workers: list[subprocess.Popen] = []  # of all threads, to be killed when the process ends
_lock = threading.Lock()


def are_equivalent(
    answer: str, reference: str, timeout: float = TIMEOUT, *, word_problem: bool = False
) -> bool:
    """Return whether `answer` states the same as `reference`, proved within `timeout` seconds.

    May be called in any thread or process. Each thread has a worker process, which stays for the
    next question. A worker that is late is killed, and the answer is then False. One that has ended,
    as for lack of memory, is replaced once, and the new one is asked.

    Args:
        timeout: of the worker's processor time; by the clock WALL times that.

    Raises:
        RuntimeError: the worker does not start.
    """
    try:
        return are_equal(answer, reference, _leave_undecided, word_problem=word_problem)
    except UndecidedError:
        pass
    except RecursionError:  # hundreds of unions or angle brackets in one another: not proved
        return False
    for _ in range(2):
        worker = getattr(_of_thread, "worker", None)
        if worker is None or worker.poll() is not None:
            worker = _of_thread.worker = _start_worker()
        line = _ask(worker, [answer, reference, word_problem], timeout)
        if line:
            return json.loads(line)
        worker.kill()
        worker.wait()
        if line is None:
            break
    return False


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
    if not _ask(worker, ["1", "1", False], START_TIMEOUT):
        worker.kill()
        raise RuntimeError("math-verify did not start; pip install -r requirements.txt")
    return worker


def _ask(worker: subprocess.Popen, question: list, timeout: float) -> str | None:
    """Return the worker's line for a question, "" if it has ended, or None if it is late."""
    before, deadline = read_usage(worker.pid).cpu, time.monotonic() + WALL * timeout
    try:
        worker.stdin.write(json.dumps(question) + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return ""
    poll = select.poll()  # select.select takes no descriptor above 1023
    poll.register(worker.stdout, select.POLLIN)
    while not poll.poll(POLL * 1000):
        if read_usage(worker.pid).cpu - before > timeout or time.monotonic() > deadline:
            return None
    return worker.stdout.readline()


def _stop_workers() -> None:
    for worker in _workers:
        worker.kill()
        worker.wait()
