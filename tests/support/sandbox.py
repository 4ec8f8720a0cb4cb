"""Helpers for tests that run programs in the sandbox."""

import contextlib
import os
from pathlib import Path

import psutil

from eval.sandbox.box import LEVELS, NOBODY, Box, find_box
from eval.sandbox.check import Job, Verdict, check_program

BOXES: dict[str, Box] = {}  # by level; those that work on this machine, the best first
for _level in LEVELS:
    _box = find_box(_level)
    if _box is not None:
        BOXES[_level] = _box


def check(
    solution: str,
    tests: str = "assert f(2) == 4",
    entry_point: str = "f",
    box: Box | None = None,
    **options: object,
) -> Verdict:
    """Check a program; `options` are further fields of eval.sandbox.check.Job."""
    return check_program(Job(solution, tests, entry_point, **options), box)


def find_boxed_processes() -> set[int]:
    """Return the processes in other process namespaces than ours: all that is in a box."""
    ours, found = os.readlink("/proc/self/ns/pid"), set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") != ours:
                found.add(int(entry.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def find_programs_of(caller: int) -> set[int]:
    """Return the boxed processes below the process `caller` that run the interpreter by now."""
    boxed, found = find_boxed_processes(), set()
    for process in psutil.Process(caller).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            command = process.cmdline()
            if process.pid in boxed and command and "python" in Path(command[0]).name:
                found.add(process.pid)
    return found


def find_zombies() -> set[int]:
    """Return dead processes that we have not reaped, or that a box left to the machine's init."""
    user, found = os.geteuid() or int(NOBODY), set()
    for entry in Path("/proc").iterdir():
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            owner = entry.stat().st_uid
        except OSError:
            continue
        is_ours = int(parent) == os.getpid() or (int(parent) == 1 and owner == user)
        if state == "Z" and is_ours:
            found.add(int(entry.name))
    return found
