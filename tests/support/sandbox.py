"""Helpers for tests that run programs in the sandbox."""

import atexit
import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import psutil
import pytest

from eval.sandbox.box import LEVELS, NOBODY, Box, find_box
from eval.sandbox.check import Job, Verdict, check_program
from tests.support.paths import ROOT

USER = "65533"  # an ordinary user, whom these tests become if they run as root
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


def show_to_all(folder: Path) -> None:
    """Let every user, as a box's, read a folder: those that pytest makes are its user's alone."""
    for path in (folder, *folder.parents):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o055 != 0o055:  # others, such as /tmp, stay as they are
            path.chmod(mode | 0o055)


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


def make_caller(who: str) -> list[str]:
    """Return the start of a command that runs Python, with our `eval`, as "root" or as a "user".

    The test is skipped where that cannot be.
    """
    if who == "root" and os.geteuid() != 0:
        pytest.skip("not root")
    if who == "root" or os.geteuid() != 0:
        return ["env", f"PYTHONPATH={ROOT}", sys.executable]
    python, folder = _find_users_python()
    if python is None:
        pytest.skip("no Python that an ordinary user may run")
    drop = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    return [*drop, "env", "-C", "/", f"PYTHONPATH={folder}", python]


@cache
def _find_users_python() -> tuple[str | None, str]:
    """Return a Python that an ordinary user may run, and a folder with the sandbox to import."""
    folder = tempfile.mkdtemp(prefix="sandbox-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(ROOT / "eval" / "sandbox", f"{folder}/eval/sandbox")
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "eval" / name, f"{folder}/eval/{name}")
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
    probe = "import sys; assert sys.version_info >= (3, 11)"
    for python in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        drop = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--"]
        command = [*drop, "env", "-C", "/", python, "-c", probe]
        if subprocess.run(command, capture_output=True).returncode == 0:
            return python, folder
    return None, folder


_CHECK = """
import ctypes, json, platform, sys
from eval.sandbox.box import find_box
from eval.sandbox.check import Job, check_programs
if platform.machine() == "x86_64":  # add_key(2), to the session's keyring
    ctypes.CDLL(None).syscall(248, b"user", b"sandbox-test-key", b"x", 1, -3)
level, jobs = json.load(sys.stdin)
box = find_box(level)
verdicts = list(check_programs([Job(*job) for job in jobs], box=box)) if box else None
json.dump(verdicts, sys.stdout)
"""


def check_as(who: str, level: str, jobs: list[Job], before: list[str]) -> list[Verdict]:
    """Check programs as "root" or as a "user", in a process of its own that `before` starts."""
    command = [*before, *make_caller(who), "-c", _CHECK]
    ran = subprocess.run(command, input=json.dumps([level, jobs]), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    verdicts = json.loads(ran.stdout)
    if verdicts is None:
        pytest.skip(f"{level} does not work on this machine for {who}")
    return [Verdict(*verdict) for verdict in verdicts]
