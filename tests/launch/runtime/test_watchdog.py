"""What rank 0 concludes from the ranks' reports; the processes themselves are in tests/distributed/test_faults.py."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue

import psutil
import pytest
import torch.distributed as dist

from launch.runtime import watchdog as watch
from launch.runtime.watchdog import SHORT_SILENCE, SILENCE, WAITS, _Seen, _State


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(watch.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def report(tick: int, **changes: object) -> dict:
    usual = {
        "where": "training step 5",
        "timed": True,
        "in_steps": True,
        "marks": 1,
        "stop": None,
        "failed": False,
    }
    return (
        usual | {"tick": tick, "at": "(launch/training/loop.py:1)", "host": "h", "pid": 7} | changes
    )


def test_a_rank_is_silent_after_its_last_tick_only(clock: Clock) -> None:
    seen, state = _Seen(), _State()
    seen.update({0: report(1), 1: report(1)})
    clock.now += SILENCE
    seen.update({0: report(2), 1: report(1)})
    assert seen.silent(state) is None
    clock.now += 1
    found = seen.silent(state)
    assert found["code"] == 1
    assert found["line"].startswith(
        "rank 1 (h, pid 7) at training step 5, (launch/training/loop.py:1): gone; not heard of for 60"
    )


@pytest.mark.parametrize("trouble", [{"failed": True}, {"stop": "SIGTERM"}])
def test_a_failed_collective_or_a_signal_shortens_the_wait(clock: Clock, trouble: dict) -> None:
    seen = _Seen()
    seen.update({0: report(1), 1: report(1)})
    clock.now += SHORT_SILENCE + 1
    seen.update({0: report(2, **trouble), 1: report(1)})
    assert "rank 1" in seen.silent(_State())["line"]


def test_the_rank_that_does_not_wait_is_the_stalled_one(clock: Clock) -> None:
    seen = _Seen()
    for tick in range(12):
        at = f"(launch/training/loop.py:1{WAITS})"
        seen.update({0: report(tick, at=at), 1: report(tick), 2: report(tick, at=at)})
        clock.now += 1
    assert seen.stalled(20) is None
    found = seen.stalled(10)
    assert (
        found["line"].startswith("rank 1 (")
        and "rank 0" not in found["line"]
        and "rank 2" not in found["line"]
    )


def test_ranks_that_never_came_are_given_up(clock: Clock) -> None:
    seen = _Seen()
    seen.update({0: report(1), 2: report(1)})
    clock.now += 5
    assert seen.missing([1, 3], 5) is None
    clock.now += 1
    assert seen.missing([1, 3], 5) == {"code": 1, "line": "rank 1; rank 3: did not come within 5 s"}
    assert seen.missing([], 5) is None


@pytest.mark.parametrize(
    ("rank", "line"), [(0, "rank 1: did not come within 2 s"), (1, "rank 1 did not reach rank 0")]
)
def test_a_process_that_the_other_never_joins_ends(rank: int, line: str) -> None:
    """Under torchrun: its store is there already, and lets each rank in at once."""
    agents = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": agents.port,
    }
    place |= {"LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_USE_AGENT_STORE": True}
    code = "from launch import distributed, errors; errors.run(lambda: distributed.start(stall=2))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {name: str(value) for name, value in place.items()},
        cwd=watch.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"error: {line}" in done.stderr


class Ranks:
    """The watches of several ranks in this process, which beat fast; whom they end, and why, is in `ends`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends: SimpleQueue = SimpleQueue()
        self.states: list[_State] = []
        self.patch = monkeypatch
        for name, value in (
            ("_end", self.end),
            ("BEAT", 0.05),
            ("SHORT_SILENCE", 0.5),
            ("SILENCE", 1.0),
        ):
            monkeypatch.setattr(watch, name, value)

    def end(self, state: _State, code: int, line: str, rank0_is_gone: bool = False) -> None:
        self.ends.put((state.rank, line))
        state.quiet = True  # ends the thread

    def connect(self, rank: int, store: dist.Store, stall: float = 60) -> dist.Store:
        self.states.append(_State(rank, 2))
        self.patch.setattr(watch, "_state", self.states[-1])
        return watch.connect(store, stall)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    before, made = threading.enumerate(), Ranks(monkeypatch)
    yield made
    for state in made.states:
        state.quiet = True
    for thread in set(threading.enumerate()) - set(before):
        thread.join(10)


def test_an_attempt_of_torchrun_has_its_own_keys(ranks: Ranks) -> None:
    """Each node's agent counts its restarts for itself: no number that ranks have tells the attempts apart."""
    store = dist.HashStore()
    ranks.connect(0, store).set("key", "of the first attempt")
    assert ranks.connect(1, store).get("key") == b"of the first attempt"
    ranks.states[1].quiet = True  # it is killed
    assert "rank 1" in ranks.ends.get(timeout=10)[1]

    again = ranks.connect(0, store)
    assert not again.check(["key"])
    again.set("key", "of the second")
    assert ranks.connect(1, store).get("key") == b"of the second"
    with pytest.raises(Empty):
        ranks.ends.get(timeout=1.5)


def test_progress_of_any_rank_is_no_stall(clock: Clock) -> None:
    seen = _Seen()
    for tick in range(20):
        seen.update({0: report(tick), 1: report(tick, marks=tick)})
        clock.now += 1
    assert seen.stalled(10) is None


@pytest.mark.parametrize(("untimed", "stall", "limit"), [(60, 5, 60), (60, 10, 100)])
def test_a_stage_that_promises_no_progress_has_longer(
    untimed: float, stall: float, limit: float, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "UNTIMED", untimed)
    seen = _Seen()
    began = clock.now
    while clock.now < began + limit:
        seen.update(
            {
                0: report(int(clock.now), timed=False),
                1: report(int(clock.now), at=f"(launch/a.py:1{WAITS})"),
            }
        )
        assert seen.stalled(stall) is None
        clock.now += 1
    assert seen.stalled(stall)["line"].startswith("rank 0 (h, pid 7) at training step 5")


def test_what_is_written_within_a_timed_stage_has_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_state", _State())
    watch.stage("training", timed=True, in_steps=True)
    marks = watch._state.marks
    with pytest.raises(OSError), watch.untimed():
        assert not watch._state.timed
        assert watch._state.in_steps  # a request to stop waits for it
        raise OSError
    assert watch._state.timed
    assert watch._state.marks > marks


def test_a_request_to_stop_waits_until_no_rank_is_missing(clock: Clock) -> None:
    seen = _Seen()
    stage = {"in_steps": False, "where": "calibration"}
    for tick in range(5):
        seen.update({0: report(tick, stop="SIGTERM", **stage), 1: report(0, **stage)})
        assert seen.asked_to_stop() is None  # rank 1 may be what the launcher stops the others for
        clock.now += 1
    for tick in range(5, 9):
        seen.update({0: report(tick, stop="SIGTERM", **stage), 1: report(tick, **stage)})
        clock.now += 1
    assert seen.asked_to_stop() == {"code": 0, "line": "stopped in calibration: SIGTERM"}


def test_in_training_steps_the_loop_stops_itself(clock: Clock) -> None:
    seen = _Seen()
    for tick in range(9):
        seen.update({0: report(tick, stop="SIGTERM"), 1: report(tick)})
        assert seen.asked_to_stop() is None
        clock.now += 1


def test_a_launcher_that_nobody_waited_for_is_gone(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_close_pipes", lambda: None)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as launcher:
        ranks.states.append(_State())
        signals, kernel = socket.socketpair()
        with signals, kernel:
            arguments = (ranks.states[0], signals, [psutil.Process(launcher.pid)])
            threading.Thread(target=watch._guard, args=arguments, daemon=True).start()
            with pytest.raises(Empty):
                ranks.ends.get(timeout=0.5)
            launcher.stdin.close()  # it ends, and is a zombie until it is waited for
            assert ranks.ends.get(timeout=10)[1].endswith("its launcher is gone")


def test_a_job_that_was_suspended_goes_on() -> None:
    """Two ranks in a process of their own, which stands still for twice the silence that ends a job."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=two_ranks, args=(there,))
    process.start()
    assert here.poll(10) and here.recv() == "started"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(4)
    os.kill(process.pid, signal.SIGCONT)
    here.send("go on")
    assert here.poll(20)
    suspended, killed = here.recv()
    process.join(10)
    assert suspended == []
    assert killed[0] == 0
    assert "gone; not heard of for 2 s" in killed[1]


def two_ranks(pipe: Connection) -> None:
    """Sends what ended a rank after it was told to go on, and then, when one is killed, what ends the other."""
    with pytest.MonkeyPatch.context() as patch:
        ranks, store = Ranks(patch), dist.HashStore()
        patch.setattr(watch, "SILENCE", 2.0)
        patch.setattr(watch, "PAUSE", 1.0)
        for rank in (0, 1):
            ranks.connect(rank, store)
            signals, ranks.states[rank].waker = socket.socketpair()
            threading.Thread(
                target=watch._guard, args=(ranks.states[rank], signals, []), daemon=True
            ).start()
        time.sleep(0.5)
        pipe.send("started")
        pipe.recv()
        time.sleep(1)
        suspended = [ranks.ends.get() for _ in range(ranks.ends.qsize())]
        ranks.states[1].quiet = True
        pipe.send((suspended, ranks.ends.get(timeout=10)))


def test_the_line_names_the_code_of_this_repository() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(watch._frame()))
    thread.start()
    thread.join()
    assert found[0].startswith("(tests/launch/runtime/test_watchdog.py:")
    assert WAITS not in found[0]
