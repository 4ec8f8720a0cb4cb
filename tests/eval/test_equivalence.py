"""The time limit of the comparison by math-verify. Needs nothing; about ten seconds."""

import os
import resource
import signal
import subprocess
import threading

import pytest

from eval import equivalence
from eval.equivalence import are_equivalent

EQUAL = (r"x\sqrt{x}", r"\sqrt{x^3}")  # that a worker is asked


def test_the_limit_holds_in_threads_and_the_next_question_is_answered() -> None:
    found = {}

    def ask(name: str, answer: str) -> None:
        found[name] = [are_equivalent(answer, "7", timeout=2), are_equivalent("14/2", "7")]

    threads = [
        threading.Thread(target=ask, args=pair)
        for pair in (("slow", r"9^{9^{9^{9}}}"), ("right", "7.0"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"slow": [False, True], "right": [True, True]}


@pytest.fixture
def worker() -> subprocess.Popen:
    """This thread's worker, which waits for a question."""
    assert are_equivalent(*EQUAL)
    return equivalence._of_thread.worker


def test_a_worker_that_cannot_run_is_not_late(worker: subprocess.Popen) -> None:
    os.kill(worker.pid, signal.SIGSTOP)  # as if other processes had the processors
    threading.Timer(1.0, os.kill, (worker.pid, signal.SIGCONT)).start()
    assert are_equivalent(*EQUAL, timeout=0.5)
    assert equivalence._of_thread.worker is worker


def test_a_worker_with_descriptors_above_1023_answers() -> None:
    equivalence._of_thread.__dict__.pop("worker", None)  # the next one is new
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    opened = []
    try:
        while not opened or opened[-1] < 1024:
            opened.append(os.dup(0))
        assert are_equivalent(*EQUAL)
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_worker_that_dies_over_a_question_is_replaced_once(worker: subprocess.Popen) -> None:
    os.kill(worker.pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (worker.pid, signal.SIGKILL)).start()
    assert are_equivalent(*EQUAL)
    assert equivalence._of_thread.worker is not worker


def test_a_worker_that_dies_before_a_question_is_no_error(
    worker: subprocess.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.kill()
    worker.wait()
    looks = [None]  # it died after this one
    monkeypatch.setattr(worker, "poll", lambda: looks.pop() if looks else -signal.SIGKILL)
    assert are_equivalent(*EQUAL)
