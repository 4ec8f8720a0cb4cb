"""Watches over a run: ranks that are gone or stall, a launcher that is gone, and signals to stop.

Each rank has two threads. One reports to rank 0 every second, through the store of the process group, what the rank is
doing; rank 0's compares the reports, decides for all and answers through the store. The other needs no network: it
looks after signals, the launcher, and whether the first one still reaches the store. Threads act while the main thread
hangs in a collective, and they end the process there: exit code 1 for a fault, after which the same command resumes.
"""

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import psutil

if TYPE_CHECKING:  # torch takes seconds to import, and a wrong option is to be answered at once
    import torch.distributed as dist

ROOT = str(Path(__file__).resolve().parents[2])
BEAT = 1.0  # seconds between two reports
SILENCE = (
    60.0  # seconds without a report, after which a rank is given up: its machine or network is gone
)
SHORT_SILENCE = (
    6.0  # the same once a collective has failed, or a launcher stops the ranks because one is gone
)
PAUSE = 5.0  # seconds between two looks of a thread here that mean that this process itself stood still meanwhile
UNTIMED = 7200.0  # seconds without progress, or 10 times --stall if that is more, in stages that do not promise any
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
COLLECTIVES = (
    "torch/distributed/",
    "deepspeed/comm/",
    "deepspeed/runtime/",
)  # code that waits for other ranks
WAITS = ", waits for other ranks"
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run")


@dataclass
class _State:
    """What the main thread tells the two others."""

    rank: int = 0
    world_size: int = 1
    speaker: bool = True  # prints the line of a fault on this node
    deputy: bool = False  # prints it where rank 0 is the one that is gone
    where: str = "starting"
    timed: bool = False  # whether this stage promises progress
    in_steps: bool = False  # whether the main thread looks at `stopping` at step boundaries
    marks: int = 0  # counts progress
    stop: str | None = None  # why this rank was asked to stop
    failed: bool = False  # a collective of this rank failed
    quiet: bool = False  # an orderly end: watch no more
    reached: float | None = None  # when the store was last reached
    on_preempted: Callable[[], None] | None = None
    waker: socket.socket | None = (
        None  # the kernel's end of the guard's socket; open as long as signals may come
    )
    lock: threading.Lock = field(default_factory=threading.Lock)


_state = _State()


def start(rank: int, world_size: int) -> None:
    """Begin with what needs no other rank, signals and the launcher, before the ranks look for each other."""
    global _state
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    _state = _State(rank, world_size, local_rank == 0, local_rank == 1 and rank == 1 < local_world)
    signals, _state.waker = socket.socketpair()
    _state.waker.setblocking(False)
    signal.set_wakeup_fd(_state.waker.fileno())  # written at once, even while the main thread hangs
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_guard, args=(_state, signals, _launchers()), daemon=True).start()


def connect(store: "dist.Store", stall: float) -> "dist.Store":
    """Go on with the other ranks; the part of the store that is this attempt's.

    torchrun keeps one store for all its attempts, with what the earlier ones wrote there, and every node counts its
    attempts for itself. So rank 0 draws a name for this one and tells it to whoever asks.

    Args:
        stall: seconds without progress that end the job, or for which ranks are waited for.
    """
    from torch.distributed import PrefixStore

    name = secrets.token_hex(8)
    if _state.rank != 0:
        store.set(f"asks/{_state.rank}", name)
        name = store.get(f"told/{name}").decode()
    _state.reached = time.monotonic()
    own = PrefixStore(name, store.clone())
    threading.Thread(target=_report, args=(_state, own, name, stall), daemon=True).start()
    return PrefixStore(name, store)


def stage(where: str, timed: bool = False, in_steps: bool = False) -> None:
    """Say what this rank does from now on.

    Args:
        timed: the stage marks its progress, so that --stall without any means that it has stalled. Others have UNTIMED.
        in_steps: the caller looks at `stopping` itself; elsewhere a request to stop ends the process within seconds.
    """
    _state.where, _state.timed, _state.in_steps = where, timed, in_steps
    mark()


def mark(where: str | None = None) -> None:
    """Count progress and, if given, say where."""
    _state.marks += 1
    _state.where = where or _state.where


@contextlib.contextmanager
def untimed() -> Iterator[None]:
    """Within a timed stage: what makes no progress for long, such as writing a large file."""
    timed, _state.timed = _state.timed, False
    try:
        yield
    finally:
        mark()  # before the stage is timed again
        _state.timed = timed


def stopping() -> bool:
    """Whether this rank was asked to stop in a stage with steps; all ranks together must then agree on one."""
    return _state.in_steps and _state.stop is not None


def on_preempted(callback: Callable[[], None]) -> None:
    """What rank 0 does before a request to stop, outside the training steps, ends the processes with exit code 0."""
    _state.on_preempted = callback


def quiet() -> None:
    """Stop watching: from here on this rank may end in good order, or be ended. The main thread calls it."""
    with _state.lock:
        _state.quiet = True
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def explain() -> None:
    """After an error in the main thread: if it came of another rank being gone, end here with a line that names it."""
    _state.failed = True
    if _state.world_size > 1 and not _state.quiet:
        time.sleep(SHORT_SILENCE + 5 * BEAT)


def _report(state: _State, store: "dist.PrefixStore", name: str, stall: float) -> None:
    """Thread: tell rank 0 what this rank does, hear what rank 0 has decided; on rank 0, decide."""
    seen = _Seen()
    tick, looked = 0, time.monotonic()
    try:
        while not state.quiet:
            tick += 1
            report = {
                key: getattr(state, key)
                for key in ("where", "timed", "in_steps", "marks", "stop", "failed")
            }
            report |= {
                "tick": tick,
                "at": _frame(),
                "host": socket.gethostname(),
                "pid": os.getpid(),
            }
            store.set(f"watch/{state.rank}", json.dumps(report))
            others = range(state.world_size) if state.rank == 0 else [0]
            arrived = [rank for rank in others if store.check([f"watch/{rank}"])]
            values = store.multi_get([f"watch/{rank}" for rank in arrived]) if arrived else []
            state.reached = now = time.monotonic()
            if now - looked > PAUSE:
                seen.pause(now - looked)
            looked = now
            seen.update(
                {rank: json.loads(value) for rank, value in zip(arrived, values, strict=True)}
            )
            absent = [rank for rank in others if rank not in seen.reports]
            if state.rank == 0:
                for rank in absent:
                    _tell(store.underlying_store, rank, name)
                verdict = (
                    seen.missing(absent, stall)
                    or seen.silent(state)
                    or seen.stalled(stall)
                    or seen.asked_to_stop()
                )
                if verdict:
                    store.set("watch/verdict", json.dumps(verdict))
                    time.sleep(
                        3 * BEAT
                    )  # rank 0 may be the store's host: let the others read first
                    _end(state, **verdict)
            elif store.check(["watch/verdict"]):
                _end(state, **json.loads(store.get("watch/verdict")))
            elif verdict := seen.silent(state):
                _end(state, **verdict, rank0_is_gone=True)
            time.sleep(0.1 * BEAT if absent else BEAT)
    except (
        RuntimeError
    ):  # the store is gone; so it is at an orderly end, but then `quiet` comes in time
        time.sleep(BEAT)
        rank0 = seen.list([0]) if 0 in seen.reports else f"rank 0 ({os.environ.get('MASTER_ADDR')})"
        _end(state, 1, f"{rank0}: gone; its store closed", rank0_is_gone=True)


def _tell(store: "dist.Store", rank: int, name: str) -> None:
    """Tell `rank`, if it has asked, the name of this attempt. An earlier attempt's rank may have asked: no harm."""
    if store.check([f"asks/{rank}"]):
        store.set(f"told/{store.get(f'asks/{rank}').decode()}", name)


class _Seen:
    """The reports of other ranks, and since when each has not changed."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.reports: dict[int, dict] = {}
        self.heard: dict[int, float] = {}  # rank -> when its tick last advanced
        self.marks, self.progress = (
            -1,
            time.monotonic(),
        )  # all marks together, and when they last advanced
        self.asked: float | None = None  # since when a rank is asked to stop

    def update(self, reports: dict[int, dict]) -> None:
        now = time.monotonic()
        for rank, report in reports.items():
            if report["tick"] != self.reports.get(rank, {}).get("tick"):
                self.heard[rank] = now
        self.reports |= reports
        marks = sum(report["marks"] for report in self.reports.values())
        if marks != self.marks:
            self.marks, self.progress = marks, now

    def pause(self, seconds: float) -> None:
        """Leave the last `seconds` out: others suspended (Slurm's SUSPEND, Ctrl-Z) with this one reported nothing."""
        self.began += seconds
        self.progress += seconds
        self.heard = {rank: heard + seconds for rank, heard in self.heard.items()}
        self.asked = None

    def missing(self, absent: list[int], limit: float) -> dict | None:
        # Nothing else gives them up: clients of torchrun's store do not wait for one another, and the process group
        # waits for ever.
        if absent and time.monotonic() - self.began > limit:
            return {"code": 1, "line": f"{self.list(absent)}: did not come within {limit:.0f} s"}
        return None

    def silent(self, this: _State) -> dict | None:
        trouble = (
            this.failed
            or this.stop
            or any(report["failed"] or report["stop"] for report in self.reports.values())
        )
        limit = SHORT_SILENCE if trouble else SILENCE
        gone = [rank for rank, heard in self.heard.items() if time.monotonic() - heard > limit]
        if gone:
            return {"code": 1, "line": f"{self.list(gone)}: gone; not heard of for {limit:.0f} s"}
        return None

    def stalled(self, limit: float) -> dict | None:
        quiet = time.monotonic() - self.progress
        if not all(report["timed"] for report in self.reports.values()):
            limit = max(10 * limit, UNTIMED)
        if quiet < limit:
            return None
        # The one that the others wait for does not report at all, or is not inside a collective.
        frozen = [rank for rank, heard in self.heard.items() if time.monotonic() - heard > 4 * BEAT]
        busy = [
            rank for rank, report in self.reports.items() if not report["at"].endswith(f"{WAITS})")
        ]
        ranks = frozen or busy or list(self.reports)
        return {"code": 1, "line": f"{self.list(ranks)}: stalled; no progress for {quiet:.0f} s"}

    def asked_to_stop(self) -> dict | None:
        reasons = [report["stop"] for report in self.reports.values() if report["stop"]]
        if not reasons or self.reports[0]["in_steps"]:
            self.asked = None
            return None
        # A launcher also sends signals when a rank has died: then it is not heard of now, and soon `silent`.
        now = time.monotonic()
        self.asked = self.asked or now
        if now - self.asked < 4 * BEAT or any(
            now - heard > 3 * BEAT for heard in self.heard.values()
        ):
            return None
        return {"code": 0, "line": f"stopped in {self.reports[0]['where']}: {reasons[0]}"}

    def list(self, ranks: list[int]) -> str:
        def describe(rank: int) -> str:
            if rank not in self.reports:
                return f"rank {rank}"
            report = self.reports[rank]
            return f"rank {rank} ({report['host']}, pid {report['pid']}) at {report['where']}, {report['at']}"

        more = f" and {len(ranks) - 4} more ranks" if len(ranks) > 4 else ""
        return "; ".join(describe(rank) for rank in ranks[:4]) + more


def _guard(state: _State, signals: socket.socket, launchers: list[psutil.Process]) -> None:
    """Thread: signals, the launcher, and the link to the store, none of which may depend on the main thread."""
    orphaned, looked = _orphaned(launchers), time.monotonic()
    while not state.quiet:
        ready, _, _ = select.select([signals], [], [], BEAT)
        before, looked = looked, time.monotonic()
        if (
            state.reached and looked - before > PAUSE
        ):  # suspended: the other thread could not reach the store either
            state.reached = min(state.reached + looked - before, looked)
        if ready:
            number = signals.recv(1)[0]
            if number == signal.SIGINT and state.stop == "SIGINT":
                _end(state, 1, "interrupted twice: ended at once")
            if number in SIGNALS:
                state.stop = state.stop or signal.Signals(number).name
        if state.stop is None and (orphaned or not all(map(_alive, launchers))):
            state.stop = "its launcher is gone"
            _close_pipes()
        if state.stop and state.reached is None:
            _end(state, 1, f"stopped while the ranks look for each other: {state.stop}")
        if state.reached and time.monotonic() - state.reached > SILENCE and not state.quiet:
            address = os.environ.get("MASTER_ADDR")
            _end(
                state,
                1,
                f"no contact with rank 0 at {address} for {SILENCE:.0f} s, at {state.where}",
                True,
            )


def _launchers() -> list[psutil.Process]:
    """The launcher's processes above this one; none for plain python and srun (Slurm ends its tasks itself)."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            if not any(name in part for part in process.cmdline()[:4] for name in LAUNCHERS):
                break
            found.append(process)
    return found


def _alive(process: psutil.Process) -> bool:
    """Whether it runs still; one that has ended and that nobody has waited for, a zombie, has its place only."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _orphaned(launchers: list[psutil.Process]) -> bool:
    """Whether the launcher was gone already before this rank began to watch it."""
    with contextlib.suppress(psutil.Error):
        if launchers:  # `deepspeed` starts its launch module, which starts the ranks
            return (
                "deepspeed.launcher.launch" in launchers[-1].cmdline() and launchers[-1].ppid() == 1
            )
        launched = "TORCHELASTIC_RUN_ID" in os.environ or any(
            word.startswith("--local_rank") for word in sys.argv
        )
        return launched and os.getppid() == 1
    return False


def _close_pipes() -> None:
    """Output that went through the launcher has no reader any more, and writing to it would fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            os.dup2(null, descriptor)


def _frame() -> str:
    """The line of this repository that the main thread is at, and whether it waits there for other ranks."""
    stack = traceback.walk_stack(sys._current_frames().get(threading.main_thread().ident))
    places = [(frame.f_code.co_filename, line) for frame, line in stack]  # innermost first
    ours = (
        (os.path.relpath(file, ROOT), line)
        for file, line in places
        if file.startswith(ROOT) and "site-packages" not in file
    )
    where = ":".join(map(str, next(ours, ("python",))))
    waits = any(part in file for file, _ in places for part in COLLECTIVES)
    return f"({where}{WAITS if waits else ''})"


def _end(state: _State, code: int, line: str, rank0_is_gone: bool = False) -> NoReturn:
    """End this process from a thread, with one line a node, unless the main thread is ending it in good order."""
    with state.lock:
        if state.quiet:
            sys.exit()  # this thread only
        with contextlib.suppress(OSError):
            if code == 0 and state.on_preempted is None:
                code = 143
            elif code == 0 and state.rank == 0:
                state.on_preempted()
            if (state.speaker and not (rank0_is_gone and state.rank == 0)) or (
                rank0_is_gone and state.deputy
            ):
                again = (
                    "; the same command goes on from the last checkpoint"
                    if state.on_preempted
                    else ""
                )
                print(f"{'error: ' if code == 1 else ''}{line}{again}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        os._exit(code)
