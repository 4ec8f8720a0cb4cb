"""A box's limits count what it uses, not what a clock shows, and count all of its processes.

Needs Linux; bubblewrap or user namespaces for the program on a busy machine. A few seconds.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from eval.sandbox import watch
from eval.sandbox.box import Box
from eval.sandbox.check import Job, check_programs
from eval.sandbox.watch import POLL, Watch, read_usage
from tests.support.sandbox import check

pytestmark = pytest.mark.xdist_group("sandbox")

SPIN = "while True: pass"
FAMILY = """
import os, threading, time
done = bytearray(64 << 20)
for at in range(0, len(done), 4096): done[at] = 1
while time.process_time() < 0.2: pass
if os.fork() == 0:
    while time.process_time() < 0.2: pass
    os._exit(0)
os.wait()
def start():
    if os.fork() == 0: time.sleep(60)
    time.sleep(60)
threading.Thread(target=start).start()
print('ready', flush=True)
"""


@contextlib.contextmanager
def running(program: str, **options: int) -> Iterator[subprocess.Popen]:
    """Run a Python program, and end its session."""
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        os.killpg(process.pid, 9)
        process.wait()


HONEST = "import time\ndef f(x):\n    while time.process_time() < 0.6: pass\n    return 4"
SPINNING = """
import os, signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for _ in range(8):
    if os.fork() == 0:
        while True: pass
def f(x):
    while True: pass
"""


@pytest.mark.slow
def test_a_busy_machine_changes_no_verdict(any_box: None) -> None:
    """The program needs half of its limit; beside the others it takes longer than its limit."""
    with contextlib.ExitStack() as stack:
        for _ in range(4 * len(os.sched_getaffinity(0))):
            stack.enter_context(running(SPIN))
        began = time.monotonic()
        verdict = check(HONEST, "assert f(2) == 4", "f", timeout=1.2)
        took = time.monotonic() - began
    print(f"{took:.1f} s")
    assert verdict.reason == "passed"
    assert took > 1.2


# The same as above but for what makes the machine busy.
@pytest.mark.full
def test_spinning_children_end_and_change_no_verdict(box: Box) -> None:
    jobs = [Job(text, "assert f(2) == 4", "f", timeout=1.2) for text in (SPINNING, HONEST)]
    spinning, honest = check_programs(jobs, box=box)
    assert spinning.reason == "timed out after 1.2 s"
    assert honest.reason == "passed"


def test_children_and_threads_count() -> None:
    with running(FAMILY, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        until = time.monotonic() + 10
        while time.monotonic() < until:
            usage = read_usage(process.pid)
            if len(usage.processes) == 2 and not usage.can_run:
                break
            time.sleep(0.01)
        family = [psutil.Process(pid) for pid in usage.processes]
        assert {member.pid for member in family[1:]} == {
            child.pid for child in psutil.Process(process.pid).children(recursive=True)
        }
        assert usage.cpu >= 0.36  # of the child that has ended, too; in ticks of 10 ms
        assert usage.memory >= 2 * (64 << 20)  # the second process has the same pages
        assert not usage.can_run
        assert watch._read_shares(usage.processes) < 2 * (64 << 20)


VFORK = """
import ctypes, time
print('ready', flush=True)
ctypes.CDLL(None).vfork()
time.sleep(60)
"""


def test_a_parent_in_vfork_is_blocked_and_cannot_run() -> None:
    with running(VFORK, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        until = time.monotonic() + 10
        while time.monotonic() < until:
            usage = read_usage(process.pid)
            if len(usage.processes) == 2 and not usage.can_run:
                break
            time.sleep(0.01)
        assert usage.is_blocked and not usage.can_run


def test_memory_that_is_not_ours_to_read_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    read = watch.Path.read_text

    def refuse(path: watch.Path) -> str:
        if path.name == "smaps_rollup":
            raise PermissionError
        return read(path)

    own, ended = os.getpid(), 2**22 + 1
    assert 0 < watch._read_shares({own: 1 << 40, ended: 1 << 40}) < 1 << 40
    monkeypatch.setattr(watch.Path, "read_text", refuse)
    assert watch._read_shares({own: 1 << 40}) == 1 << 40


def test_what_sleeps_is_charged_and_what_waits_for_a_processor_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    state = {"cpu": 0.0, "can_run": False, "is_blocked": False}
    monkeypatch.setattr(
        watch, "read_usage", lambda outer: watch.Usage(**state, memory=0, processes={})
    )
    sleeping = Watch(1, 1.0, 1 << 30)
    for _ in range(9):
        now += POLL
        assert sleeping.find_excess() == ""
    now += POLL * 1.01
    assert sleeping.find_excess() == "timed out after 1 s"
    state["is_blocked"] = True
    blocked = Watch(1, 1.0, 1 << 30)
    for _ in range(9 + round(watch.BLOCKED / POLL)):  # a second for the disk comes on top
        now += POLL
        assert blocked.find_excess() == ""
    now += POLL * 2
    assert blocked.find_excess() == "timed out after 1 s"
    state["is_blocked"] = False
    stopped = Watch(1, 1.0, 1 << 30)
    now += 15  # the caller itself was stopped
    assert stopped.find_excess() == ""
    starved = Watch(1, 1.0, 1 << 30)
    state["can_run"] = True
    for _ in range(19):
        now += 1
        assert starved.find_excess() == ""
    state["cpu"] = 1.0
    assert starved.find_excess() == "timed out after 1 s"
    hiding = Watch(1, 1.0, 1 << 30)
    state["cpu"] = 0.0
    now += watch.WALL
    assert hiding.find_excess() == "timed out after 1 s"
