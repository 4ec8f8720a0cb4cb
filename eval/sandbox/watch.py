"""Limits on a box as a whole: its time and its memory, watched from outside through /proc.

Limits of processes (setrlimit(2)) do not bound a box, because it may have several. A cgroup would,
but an ordinary user rarely has one with a memory controller; so this looks every POLL seconds. In
that time a box can take more memory than it may; the kernel then ends it before others, because its
oom_score_adj is 1000.

The time that counts is what a program uses, not what a clock shows: the processor time of all its
processes, and the time in which none of them could run (it sleeps, or waits for what never comes).
Time in which it waits for a processor does not count, so a loaded machine changes no verdict.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

POLL = 0.1  # seconds
# Times the limit, by the clock. For programs that are made to use time without being charged: if a
# parent ignores SIGCHLD, nobody gets the time that its dead children used, see getrusage(2).
WALL = 20
# Seconds at a stretch in which a box may wait for a disk without being charged. A parent in
# vfork(2) looks the same, for as long as its child sleeps.
BLOCKED = 1.0
_TICK = 1 / os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Usage(NamedTuple):
    """What processes use."""

    cpu: float  # seconds, with those of children that were waited for
    memory: int  # bytes; memory that several processes share may count several times
    can_run: bool  # a thread runs, or waits for a processor
    is_blocked: bool  # a thread is in an uninterruptible wait, as for a disk
    processes: dict[int, int]  # process -> its part of `memory`


class Watch:
    """The limits of a box, and what it has used."""

    def __init__(
        self, outer: int, timeout: float, memory: int, partners: Sequence[int] = ()
    ) -> None:
        """Begin to watch.

        Args:
            outer: the process that the box's processes descend from.
            timeout: seconds that the box may use.
            memory: bytes that its processes may have.
            partners: processes, with their descendants, that the box may have to wait for.
        """
        self.outer, self.timeout, self.memory, self.partners = outer, timeout, memory, partners
        self.cpu = self.idle = self.blocked = 0.0
        self.began = self.looked = time.monotonic()

    def find_excess(self) -> str:
        """Return which limit the box has exceeded, or "". For a call every POLL seconds."""
        usage = read_usage(self.outer)
        now = time.monotonic()
        others = [] if usage.can_run else [read_usage(outer) for outer in self.partners]
        # If this process itself was stopped or late, the box is not charged for it.
        since = min(now - self.looked, 2 * POLL)
        if any(each.can_run for each in (usage, *others)):
            self.blocked = 0.0
        elif any(each.is_blocked for each in (usage, *others)) and self.blocked < BLOCKED:
            self.blocked += since
        else:
            self.idle += since
        self.looked = now
        self.cpu = max(self.cpu, usage.cpu)
        used, passed = self.cpu + self.idle, now - self.began
        if used >= self.timeout or passed >= WALL * self.timeout:
            return f"timed out after {self.timeout:g} s"
        if usage.memory > self.memory and _read_shares(usage.processes) > self.memory:
            return f"took more than {self.memory >> 20} MiB of memory"
        return ""


def read_usage(outer: int) -> Usage:
    """Return what a process and all its descendants use, see proc(5)."""
    cpu, states = 0.0, set()
    waiting, processes = [outer], {}
    while waiting:
        process = waiting.pop()
        try:
            fields = _read_stat(f"/proc/{process}/stat")
            threads = os.listdir(f"/proc/{process}/task")
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        cpu += sum(map(int, fields[11:15])) * _TICK  # utime, stime, cutime, cstime
        processes[process] = int(fields[21]) * _PAGE  # rss
        for thread in threads:
            try:
                state = _read_stat(f"/proc/{process}/task/{thread}/stat")[0]
                children = Path(f"/proc/{process}/task/{thread}/children").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            states.add(state)
            waiting += map(int, children.split())
    return Usage(cpu, sum(processes.values()), "R" in states, "D" in states, processes)


def _read_stat(path: str) -> list[str]:
    """Return the fields of a process' or a thread's stat, from the state on."""
    return Path(path).read_text(errors="replace").rpartition(")")[2].split()


def _read_shares(processes: Mapping[int, int]) -> int:
    """Return the bytes that processes have, with shared memory divided among those that share.

    Args:
        processes: as in Usage. Those that are not ours to read, which a program can bring about
            (PR_SET_DUMPABLE), count with all of that.
    """
    total = 0
    for process, memory in processes.items():
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        except OSError:
            total += memory
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total
