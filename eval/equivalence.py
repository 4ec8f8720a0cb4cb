"""Whether two answers are the same in mathematics: asks eval.math_worker, and gives up after a time."""

import atexit
import json
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

TIMEOUT = 8.0  # seconds of one comparison
START = 60.0  # seconds in which a worker's libraries load

_of_thread = threading.local()
_all: list[subprocess.Popen] = []
_lock = threading.Lock()


def equivalent(answer: str, reference: str, timeout: float = TIMEOUT) -> bool:
    """Whether math-verify takes LaTeX `answer` for `reference`; False where it does not end within `timeout` seconds.

    In any thread or process: each thread has a worker process, kept for the next question and killed when it is late.
    """
    worker = getattr(_of_thread, "worker", None)
    if worker is None or worker.poll() is not None:
        worker = _of_thread.worker = _start()
    worker.stdin.write(json.dumps([answer, reference]) + "\n")
    worker.stdin.flush()
    line = _line(worker, timeout)
    if line is None:
        worker.kill()
        worker.wait()
        return False
    return json.loads(line)


def _start() -> subprocess.Popen:
    worker = subprocess.Popen(
        [sys.executable, "-m", "eval.math_worker"],
        cwd=Path(__file__).resolve().parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with _lock:
        if not _all:
            atexit.register(_stop)
        _all[:] = [other for other in _all if other.poll() is None] + [worker]
    worker.stdin.write(json.dumps(["1", "1"]) + "\n")  # answered when its libraries are there
    worker.stdin.flush()
    if _line(worker, START) is None:
        worker.kill()
        raise RuntimeError("math-verify did not start; pip install -r requirements.txt")
    return worker


def _line(worker: subprocess.Popen, timeout: float) -> str | None:
    """One line of the worker's, or None if there is none in time or it has ended."""
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        if select.select([worker.stdout], [], [], left)[0]:
            return worker.stdout.readline() or None
    return None


def _stop() -> None:
    for worker in _all:
        worker.kill()
        worker.wait()
