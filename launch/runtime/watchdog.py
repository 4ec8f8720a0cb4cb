"""Watch over a run: ranks that are gone or stall, a launcher that is gone, and signals to stop.

Each rank has two threads. One reports to rank 0 every second, through the store of the process
group, what the rank is doing. On rank 0 this thread judges the reports (launch.runtime.peers),
decides for all ranks and answers through the store. The other thread, the guard, needs no network:
it handles signals, watches the launcher, and checks that the first thread still reaches the store.
The threads act while the main thread hangs in a collective. They end the process with exit code 1
for a fault that a new start may not meet; the same command then resumes the run. The exit code is 2
for an error that the user must mend.

There is one watchdog in a process, because signals and the default process group belong to the
process. `start_watchdog` makes it, and the functions below act on it. In a process that starts
none, such as a unit test, they act on a watchdog without threads.
"""

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import psutil

from launch.runtime.launcher import close_pipes, find_launchers, is_alive, was_orphaned
from launch.runtime.peers import WAITS, Limits, PeerReports, Report, Verdict

if TYPE_CHECKING:  # torch takes seconds to import, and a wrong option is to be answered at once
    import torch.distributed as dist
    from torch import nn

ROOT = str(Path(__file__).resolve().parents[2])
LIMITS = Limits()
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Code that waits for other ranks.
COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "deepspeed/runtime/")


@dataclass
class Watchdog:
    """The state that the main thread and the two threads of a watchdog share."""

    rank: int = 0
    world_size: int = 1
    is_speaker: bool = True  # prints the line of a fault on this node
    is_deputy: bool = False  # prints it where rank 0 is the one that is gone
    limits: Limits = LIMITS
    # Set by the main thread.
    phase: str = "starting"  # what the rank is doing
    timed: bool = False  # whether the phase has a stall limit
    in_steps: bool = False  # whether the main thread looks at `stop_requested` at step boundaries
    heartbeats: int = 0  # counts progress
    heartbeats_before: int = 0  # of them, those before the phase began
    failed: bool = False  # a collective of this rank has failed
    disarmed: bool = False  # the process ends in good order: watch no more
    error: str | None = None  # why this rank must stop
    error_code: int = 1
    on_preempted: Callable[[], None] | None = None
    on_error: Callable[[str, int], None] | None = None
    # Set by the threads.
    stop_reason: str | None = None  # why this rank was asked to stop
    reached: float | None = None  # when the store was last reached
    # The kernel writes the numbers of signals here; it stays open as long as signals may come.
    signal_socket: socket.socket | None = None
    end_lock: threading.Lock = field(default_factory=threading.Lock)  # one thread ends the process


_watchdog = Watchdog()


def start_watchdog(rank: int, world_size: int) -> Watchdog:
    """Make this process's watchdog, before the ranks look for each other.

    It begins with what needs no other rank, signals and the launcher; `join_peers` adds the ranks.
    It lives until `disarm`.
    """
    global _watchdog
    local_rank, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    _watchdog = Watchdog(
        rank,
        world_size,
        is_speaker=local_rank == 0,
        is_deputy=local_rank == 1 and rank == 1 < local_world,
        limits=LIMITS,
    )
    signals, _watchdog.signal_socket = socket.socketpair()
    _watchdog.signal_socket.setblocking(False)
    # Written to at once, even while the main thread hangs.
    signal.set_wakeup_fd(_watchdog.signal_socket.fileno())
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    arguments = (_watchdog, signals, find_launchers())
    threading.Thread(target=_guard, args=arguments, daemon=True).start()
    return _watchdog


def join_peers(watchdog: Watchdog, store: "dist.Store", stall: float) -> "dist.Store":
    """Begin to report to rank 0, or on rank 0 to judge the reports.

    torchrun keeps one store for all its attempts, with what the earlier ones wrote there, and every
    node counts its attempts for itself. So rank 0 draws a name for this attempt and tells it to
    every rank that asks.

    Args:
        watchdog: of this process.
        store: of the process group.
        stall: seconds without progress that end the job, or for which ranks are waited for.

    Returns:
        The part of the store that belongs to this attempt.
    """
    from torch.distributed import PrefixStore

    attempt = secrets.token_hex(8)
    if watchdog.rank != 0:
        store.set(f"asks/{watchdog.rank}", attempt)
        attempt = store.get(f"told/{attempt}").decode()
    watchdog.reached = time.monotonic()
    own = PrefixStore(attempt, store.clone())
    arguments = (watchdog, own, attempt, stall)
    threading.Thread(target=_exchange_reports, args=arguments, daemon=True).start()
    return PrefixStore(attempt, store)


def set_phase(phase: str, timed: bool = False, in_steps: bool = False) -> None:
    """Say what this rank does from now on.

    Args:
        phase: such as "calibration", for the line of a fault.
        timed: the phase has heartbeats, so that --stall seconds without one mean that it has
            stalled. In other phases `Limits.untimed` holds.
        in_steps: the caller looks at `stop_requested` itself; elsewhere a request to stop ends the
            process within seconds.
    """
    _watchdog.phase, _watchdog.timed, _watchdog.in_steps = phase, timed, in_steps
    _watchdog.heartbeats_before = _watchdog.heartbeats
    heartbeat()


def heartbeat(phase: str | None = None) -> None:
    """Count progress and, if given, say what this rank does now."""
    _watchdog.heartbeats += 1
    _watchdog.phase = phase or _watchdog.phase


def beat_on_forward(model: "nn.Module") -> None:
    """Count each forward pass of `model` as progress: a long response or batch may take minutes."""
    model.register_forward_pre_hook(lambda *_: heartbeat())


def current_phase() -> str:
    """Return what this rank does."""
    return _watchdog.phase


@contextlib.contextmanager
def without_stall_limit() -> Iterator[None]:
    """Lift the stall limit of a timed phase, to write a large file for example."""
    timed, _watchdog.timed = _watchdog.timed, False
    try:
        yield
    finally:
        heartbeat()  # before the phase is timed again
        _watchdog.timed = timed


def stop_requested() -> bool:
    """Return whether this rank was asked to stop in a phase with steps.

    Ranks are asked at different moments: all must agree on the step after which they stop.
    """
    return _watchdog.in_steps and _watchdog.stop_reason is not None


def on_preempted(callback: Callable[[], None]) -> None:
    """Have rank 0 call `callback` when a request to stop, outside the training steps, ends the run.

    The processes then end with exit code 0, without a callback with 143.
    """
    _watchdog.on_preempted = callback


def on_error(callback: Callable[[str, int], None]) -> None:
    """Have rank 0 call `callback` with the line and the exit code of an error of another rank.

    Its own errors rank 0 knows.
    """
    _watchdog.on_error = callback


def report_error(line: str, code: int, shared: bool = False) -> None:
    """Tell rank 0 of an error of this rank, so that all ranks end with one line and code.

    The process ends here, unless there is no other rank or rank 0 does not answer.

    Args:
        shared: every rank is thought to meet it: if rank 0 does, the line names no rank.
    """
    joined = _watchdog.reached is not None
    if _watchdog.world_size > 1 and joined and not _watchdog.disarmed:
        _watchdog.error_code = code
        if not shared or _watchdog.rank != 0:
            line = f"rank {_watchdog.rank} ({socket.gethostname()}, pid {os.getpid()}): {line}"
        _watchdog.error = line
        time.sleep(_watchdog.limits.short_silence + 5 * _watchdog.limits.beat)


def disarm() -> None:
    """Stop watching, so that this rank may end in good order. The main thread calls this."""
    with _watchdog.end_lock:
        _watchdog.disarmed = True
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def report_lost_peer() -> None:
    """Wait, after an error in the main thread, for the threads to find a rank that is gone.

    If one is, the process ends here with a line that names it; if none is, the error was this
    rank's own.
    """
    if _watchdog.failed:
        return  # waited already
    _watchdog.failed = True
    if _watchdog.world_size > 1 and not _watchdog.disarmed:
        time.sleep(_watchdog.limits.short_silence + 5 * _watchdog.limits.beat)


def _exchange_reports(
    watchdog: Watchdog, store: "dist.PrefixStore", attempt: str, stall: float
) -> None:
    """Report to rank 0 at each beat, and read its verdict; on rank 0, decide. Runs in a thread."""
    beat = watchdog.limits.beat
    peers = PeerReports(watchdog.limits)
    others = range(watchdog.world_size) if watchdog.rank == 0 else [0]
    tick, looked = 0, time.monotonic()
    try:
        while not watchdog.disarmed:
            tick += 1
            report = _make_report(watchdog, tick)
            store.set(f"watch/{watchdog.rank}", json.dumps(asdict(report)))
            arrived = _read_reports(store, others)
            watchdog.reached = now = time.monotonic()
            if now - looked > watchdog.limits.pause:
                peers.skip_pause(now - looked)
            looked = now
            peers.update(arrived)
            absent = [rank for rank in others if rank not in peers.reports]
            in_trouble = watchdog.failed or watchdog.stop_reason is not None
            if watchdog.rank == 0:
                for rank in absent:
                    _tell_attempt(store.underlying_store, rank, attempt)
                verdict = peers.judge(absent, stall, in_trouble)
                if verdict:
                    of_another = watchdog.error is None and verdict == peers.find_error()
                    if of_another and watchdog.on_error is not None:
                        # First, for a launcher may kill this rank once another one has ended.
                        with contextlib.suppress(OSError):  # of a full disk
                            watchdog.on_error(verdict.line, verdict.code)
                    store.set("watch/verdict", json.dumps(verdict))
                    # Rank 0 may be the store's host: let the others read first.
                    time.sleep(3 * beat)
                    _end_process(watchdog, verdict)
            elif store.check(["watch/verdict"]):
                _end_process(watchdog, Verdict(*json.loads(store.get("watch/verdict"))))
            elif verdict := peers.find_silent(in_trouble):
                _end_process(watchdog, verdict, rank0_is_gone=True)
            time.sleep(0.1 * beat if absent or watchdog.error else beat)
    except RuntimeError:
        # The store is gone. At an orderly end it is too, but then `disarm` is called in time.
        time.sleep(beat)
        known = 0 in peers.reports
        rank0 = peers.describe([0]) if known else f"rank 0 ({os.environ.get('MASTER_ADDR')})"
        verdict = Verdict(1, f"{rank0}: gone; its store closed")
        _end_process(watchdog, verdict, rank0_is_gone=True)


def _make_report(watchdog: Watchdog, tick: int) -> Report:
    return Report(
        tick=tick,
        phase=watchdog.phase,
        location=_locate_main_thread(),
        host=socket.gethostname(),
        pid=os.getpid(),
        timed=watchdog.timed,
        in_steps=watchdog.in_steps,
        heartbeats=watchdog.heartbeats,
        phase_heartbeats=watchdog.heartbeats - watchdog.heartbeats_before,
        stop_reason=watchdog.stop_reason,
        failed=watchdog.failed,
        error=watchdog.error,
        error_code=watchdog.error_code,
    )


def _read_reports(store: "dist.PrefixStore", ranks: range | list[int]) -> dict[int, Report]:
    """Read the newest report of each of `ranks` that has reported."""
    arrived = [rank for rank in ranks if store.check([f"watch/{rank}"])]
    if not arrived:
        return {}
    values = store.multi_get([f"watch/{rank}" for rank in arrived])
    return {rank: Report(**json.loads(value)) for rank, value in zip(arrived, values, strict=True)}


def _tell_attempt(store: "dist.Store", rank: int, attempt: str) -> None:
    """Tell `rank`, if it has asked, the name of this attempt.

    A rank of an earlier attempt may have asked; the answer does no harm.
    """
    if store.check([f"asks/{rank}"]):
        store.set(f"told/{store.get(f'asks/{rank}').decode()}", attempt)


def _guard(watchdog: Watchdog, signals: socket.socket, launchers: list[psutil.Process]) -> None:
    """Handle signals, and watch the launcher and the link to the store. Runs in a thread."""
    limits = watchdog.limits
    orphaned, looked = was_orphaned(launchers), time.monotonic()
    while not watchdog.disarmed:
        ready, _, _ = select.select([signals], [], [], limits.beat)
        before, looked = looked, time.monotonic()
        if watchdog.reached and looked - before > limits.pause:
            # The process was suspended: the other thread could not reach the store either.
            watchdog.reached = min(watchdog.reached + looked - before, looked)
        if ready:
            _take_signal(watchdog, signals.recv(1)[0])
        if watchdog.stop_reason is None and (orphaned or not all(map(is_alive, launchers))):
            watchdog.stop_reason = "its launcher is gone"
            close_pipes()
        if watchdog.stop_reason and watchdog.reached is None:
            line = f"stopped while the ranks look for each other: {watchdog.stop_reason}"
            _end_process(watchdog, Verdict(1, line))
        if watchdog.reached and time.monotonic() - watchdog.reached > limits.silence:
            address = os.environ.get("MASTER_ADDR")
            line = f"no contact with rank 0 at {address} for {limits.silence:.0f} s"
            verdict = Verdict(1, f"{line}, at {watchdog.phase}")
            _end_process(watchdog, verdict, rank0_is_gone=True)


def _take_signal(watchdog: Watchdog, number: int) -> None:
    """Note a request to stop, or end at once if it is the second interrupt."""
    if number == signal.SIGINT and watchdog.stop_reason == "SIGINT":
        _end_process(watchdog, Verdict(1, "interrupted twice: ended at once"))
    if number in SIGNALS:
        watchdog.stop_reason = watchdog.stop_reason or signal.Signals(number).name


def _locate_main_thread() -> str:
    """Return the main thread's `(file:line)` in this repository, with WAITS if it waits there."""
    stack = traceback.walk_stack(sys._current_frames().get(threading.main_thread().ident))
    places = [(frame.f_code.co_filename, line) for frame, line in stack]  # innermost first
    location = "python"
    for file, line in places:
        if file.startswith(ROOT) and "site-packages" not in file:
            location = f"{os.path.relpath(file, ROOT)}:{line}"
            break
    waits = any(part in file for file, _ in places for part in COLLECTIVES)
    return f"({location}{WAITS if waits else ''})"


def _end_process(watchdog: Watchdog, verdict: Verdict, rank0_is_gone: bool = False) -> NoReturn:
    """End this process from a thread, unless the main thread has disarmed the watchdog.

    On each node one rank prints the verdict: the first, or the second where rank 0 is gone.
    """
    code = verdict.code
    with watchdog.end_lock:
        if watchdog.disarmed:
            sys.exit()  # this thread only
        with contextlib.suppress(OSError):
            if code == 0 and watchdog.on_preempted is None:
                code = 143
            elif code == 0 and watchdog.rank == 0:
                watchdog.on_preempted()
            speaks = watchdog.is_speaker and not (rank0_is_gone and watchdog.rank == 0)
            if speaks or (rank0_is_gone and watchdog.is_deputy):
                error = "error: " if code in (1, 2) else ""
                again = "; the same command resumes from the last checkpoint"
                resumes = watchdog.on_preempted is not None and code != 2
                line = f"{error}{verdict.line}{again if resumes else ''}"
                print(line, file=sys.stderr, flush=True)
            sys.stdout.flush()
        os._exit(code)
