"""The watchdog's threads end ranks that are alone, and leave those alone that were only suspended.

The ranks are threads of this process, which beat fast; whole runs are in
tests/distributed/test_faults.py. Needs fork. Takes 30 s.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue

import psutil
import pytest
import torch.distributed as dist

from launch.runtime import watchdog
from launch.runtime.peers import WAITS, Limits, Verdict
from launch.runtime.watchdog import Watchdog

FAST = Limits(beat=0.05, short_silence=0.5, silence=1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "line"), [(0, "rank 1: did not come within 2 s"), (1, "rank 1 did not reach rank 0")]
)
def test_a_process_that_the_other_never_joins_ends(rank: int, line: str) -> None:
    """Under torchrun: its store is there already, and lets each rank in at once."""
    agents = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": agents.port,
        "LOCAL_WORLD_SIZE": 2,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    done = start_rank("", environment)
    assert done.returncode == 1
    assert f"error: {line}" in done.stderr


@pytest.mark.slow
def test_ranks_that_the_network_does_not_connect_end_after_the_stall_limit() -> None:
    done = start_rank("import time; distributed.dist.barrier = lambda: time.sleep(60)", {})
    assert done.returncode == 1
    assert (
        " at connecting the ranks over the network, (launch/runtime/distributed.py:" in done.stderr
    )
    assert "stalled; no progress for 2 s" in done.stderr


def start_rank(body: str, environment: dict[str, object]) -> subprocess.CompletedProcess:
    """Start the process group in a process of its own, with a stall limit of 2 s, after `body`."""
    code = f"""
from launch.runtime import distributed, entry
{body}
entry.run_command(lambda: distributed.start_process_group(stall=2))"""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {name: str(value) for name, value in environment.items()},
        cwd=watchdog.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


class Ranks:
    """Watchdogs of several ranks in this process; whom they end, and why, is in `ends`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limits: Limits = FAST) -> None:
        self.limits = limits
        self.ends: SimpleQueue = SimpleQueue()
        self.watchdogs: list[Watchdog] = []
        monkeypatch.setattr(watchdog, "_end_process", self.end)

    def end(self, of_rank: Watchdog, verdict: Verdict, rank0_is_gone: bool = False) -> None:
        self.ends.put((of_rank.rank, verdict.line))
        of_rank.disarmed = True  # ends the thread

    def make(self, rank: int = 0) -> Watchdog:
        self.watchdogs.append(Watchdog(rank, 2, limits=self.limits))
        return self.watchdogs[-1]

    def join(self, rank: int, store: dist.Store, stall: float = 60) -> dist.Store:
        return watchdog.join_peers(self.make(rank), store, stall)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    before, made = threading.enumerate(), Ranks(monkeypatch)
    yield made
    for of_rank in made.watchdogs:
        of_rank.disarmed = True
    for thread in set(threading.enumerate()) - set(before):
        thread.join(10)


def test_an_attempt_of_torchrun_has_its_own_keys(ranks: Ranks) -> None:
    """Each node's agent counts its restarts for itself: no number tells the attempts apart."""
    store = dist.HashStore()
    ranks.join(0, store).set("key", "of the first attempt")
    assert ranks.join(1, store).get("key") == b"of the first attempt"
    ranks.watchdogs[1].disarmed = True  # it is killed
    assert "rank 1" in ranks.ends.get(timeout=10)[1]

    again = ranks.join(0, store)
    assert not again.check(["key"])
    again.set("key", "of the second")
    assert ranks.join(1, store).get("key") == b"of the second"
    with pytest.raises(Empty):
        ranks.ends.get(timeout=1.5)


def test_writing_within_a_timed_phase_has_no_stall_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Watchdog()
    monkeypatch.setattr(watchdog, "_watchdog", own)
    watchdog.set_phase("training", timed=True, in_steps=True)
    heartbeats = own.heartbeats
    with pytest.raises(OSError), watchdog.without_stall_limit():
        assert not own.timed
        assert own.in_steps  # a request to stop waits for it
        raise OSError
    assert own.timed
    assert own.heartbeats > heartbeats


def test_a_request_to_stop_is_seen_in_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Watchdog(stop_reason="SIGTERM")
    monkeypatch.setattr(watchdog, "_watchdog", own)
    watchdog.set_phase("calibration", timed=True)
    assert not watchdog.stop_requested()
    watchdog.set_phase("training", timed=True, in_steps=True)
    assert watchdog.stop_requested()


def test_a_launcher_that_nobody_waited_for_is_gone(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "close_pipes", lambda: None)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as launcher:
        signals, kernel = socket.socketpair()
        with signals, kernel:
            arguments = (ranks.make(), signals, [psutil.Process(launcher.pid)])
            threading.Thread(target=watchdog._guard, args=arguments, daemon=True).start()
            with pytest.raises(Empty):
                ranks.ends.get(timeout=0.5)
            launcher.stdin.close()  # it ends, and is a zombie until it is waited for
            assert ranks.ends.get(timeout=10)[1].endswith("its launcher is gone")


@pytest.mark.slow
def test_a_job_that_was_suspended_continues() -> None:
    """Two ranks in a process of their own, which stands still for twice the fatal silence."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=run_two_ranks, args=(there,))
    process.start()
    assert here.poll(10) and here.recv() == "started"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(4)
    os.kill(process.pid, signal.SIGCONT)
    here.send("continue")
    assert here.poll(20)
    suspended, killed = here.recv()
    process.join(10)
    assert suspended == []
    assert killed[0] == 0
    assert "gone; not heard of for 2 s" in killed[1]


def run_two_ranks(pipe: Connection) -> None:
    """Send what ended a rank after the pause, and then, when one is killed, what ends the other."""
    with pytest.MonkeyPatch.context() as patch:
        ranks = Ranks(patch, replace(FAST, silence=2.0, pause=1.0))
        store = dist.HashStore()
        for rank in (0, 1):
            ranks.join(rank, store)
            signals, ranks.watchdogs[rank].signal_socket = socket.socketpair()
            arguments = (ranks.watchdogs[rank], signals, [])
            threading.Thread(target=watchdog._guard, args=arguments, daemon=True).start()
        time.sleep(0.5)
        pipe.send("started")
        pipe.recv()
        time.sleep(1)
        suspended = [ranks.ends.get() for _ in range(ranks.ends.qsize())]
        ranks.watchdogs[1].disarmed = True
        pipe.send((suspended, ranks.ends.get(timeout=10)))


def test_the_line_names_the_code_of_this_repository() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(watchdog._locate_main_thread()))
    thread.start()
    thread.join()
    assert found[0].startswith("(tests/launch/runtime/test_watchdog.py:")
    assert WAITS not in found[0]
