"""Runs programs that a model wrote against a benchmark's tests, in a box that they cannot leave.

A check is two processes. The solution runs in the box (eval.sandbox.runner): no network, no files but a read-only /usr
and the interpreter, no other processes, limits on everything. The tests run in a judge outside it (eval.sandbox.judge),
which calls the solution's function over a pipe and compares plain data, so neither exit codes, prints nor objects that
claim to be equal make a pass. The box is bubblewrap's or, without it, one of util-linux `unshare`; a kernel flaw opens
both: for programs meant to attack, use a virtual machine. With `in_box` the tests, which then need the solution's own
objects, run in the box after the solution: still isolated, but a solution made for it can forge that pass.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

from eval.errors import EvalError
from eval.sandbox import judge as sandbox_judge
from eval.sandbox import runner as sandbox_runner
from eval.sandbox.box import BOX_ENVIRONMENT, ENVIRONMENT, FLAGS, LEVELS, Box, find, python

MEMORY = 1 << 30  # bytes of address space, for the solution and for the judge
PROCESSES = 32  # of the solution, threads included
_ROOT = str(Path(__file__).resolve().parents[2])
# Both are imported here for their compiled files, which spare each judge 10 ms.
_JUDGE = (
    f"import sys; sys.path.append({_ROOT!r}); from {sandbox_judge.__name__} import main; main()"
)
_RUNNER = Path(sandbox_runner.__file__).read_text(encoding="utf-8")


class Verdict(NamedTuple):
    passed: bool
    reason: str
    """In a few words, "passed" or why not; part of it may be the solution's own text."""
    isolation: str
    """What kept the solution in: "bubblewrap", "namespaces" or "none", and where the tests ran if not in the judge."""


class Job(NamedTuple):
    """The arguments of one `check`."""

    solution: str
    tests: str
    entry_point: str
    setup: str = ""
    in_box: bool = False
    timeout: float = 10.0


_chosen: Box | None = None
_lock = threading.Lock()


def isolation() -> str:
    """The level of isolation that this machine gives, tried once; EvalError where it gives none."""
    return _box(allow_unsandboxed=False).level


def check(
    solution: str,
    tests: str,
    entry_point: str,
    timeout: float = 10.0,
    *,
    setup: str = "",
    in_box: bool = False,
    allow_unsandboxed: bool = False,
) -> Verdict:
    """Whether a program passes tests, at most `timeout` seconds and moments later; in any thread or process.

    Args:
        solution: a whole untrusted module.
        tests: text that calls the solution's function `entry_point` by that name, with and for plain data; a solution
            passes where it ends with no exception.
        timeout: seconds, of all that the solution and the tests do.
        setup: what the tests need, run before them in the judge; with `in_box` in the box, after the solution.
        in_box: run the tests in the box, for those that need the solution's classes or pass more than plain data.
        allow_unsandboxed: go on with limits alone where no box works.

    Raises:
        EvalError: no box works here, or it did not start, or the tests cannot run whatever the solution.
    """
    box = _box(allow_unsandboxed)
    shown = box.level + (", tests in the box" if in_box else "")
    cpu = int(timeout) + 2  # seconds; the deadline comes first, this is for what it could not end
    fields = {
        "solution": solution,
        "tests": tests,
        "setup": setup,
        "entry_point": entry_point,
        "in_box": in_box,
    }
    answer, errors = _run(box, json.dumps(fields).encode(), cpu, time.monotonic() + timeout)
    if answer is None:
        return Verdict(False, f"timed out after {timeout:g} s", shown)
    if not answer:
        return Verdict(False, "the judge could not read its answers", shown)
    verdict = json.loads(answer)
    if verdict["fault"]:
        raise EvalError(verdict["fault"])
    if not verdict["started"]:
        raise EvalError(
            f"the sandbox ({box.level}) did not start: {errors or 'no message'}; see if memory is short"
        )
    # One line that a terminal can show: the text may be the solution's.
    words = "".join(c if c.isprintable() else "?" for c in " ".join(verdict["reason"].split()))[
        :200
    ]
    return Verdict(verdict["passed"], words, shown)


def check_many(
    jobs: Iterable[Job],
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
    *,
    allow_unsandboxed: bool = False,
) -> list[Verdict]:
    """The verdicts of `jobs` in their order, `workers` at a time (as many as processors); tells how many are done."""
    done = 0

    def one(job: Job) -> Verdict:
        nonlocal done
        verdict = check(**job._asdict(), allow_unsandboxed=allow_unsandboxed)
        with counting:
            done += 1
            if progress is not None:
                progress(done)
        return verdict

    counting = threading.Lock()
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        try:
            return list(pool.map(one, jobs))
        except BaseException:  # an interrupt, or no sandbox: what has not begun is not begun
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def run(program: str, job: bytes, timeout: float, folders: tuple[str, ...]) -> bytes | None:
    """What a Python program in the box, with `job` as its input, writes; None where it is late. Only bubblewrap's.

    For a checker that runs what it checks in its own process: kept in like a solution, but it sets its own limits, and
    what it writes is no more to be trusted than what it runs.

    Args:
        folders: shown to it, read-only: its libraries.

    Raises EvalError where bubblewrap does not work.
    """
    box = _with_folders(folders)
    with TemporaryFile() as given, TemporaryFile() as out:
        given.write(job)
        given.seek(0)
        inside = subprocess.Popen(
            [*box.command, "-c", program],
            stdin=given,
            stdout=out,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        )
        try:
            inside.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(inside, box.level)
        out.seek(0)
        return out.read()


@cache
def _with_folders(folders: tuple[str, ...]) -> Box:
    box = find("bubblewrap", folders)
    if box is None:
        raise EvalError(
            "the sandbox needs bubblewrap here (Debian: apt-get install bubblewrap), and user namespaces"
        )
    return box


def _run(box: Box, job: bytes, cpu: int, deadline: float) -> tuple[bytes | None, str]:
    """The judge's answer, None where it is late, and what the box wrote while it was set up. Nothing stays behind."""
    asked, asks = os.pipe()
    answers, answered = os.pipe()
    inside = judge = None
    out: bytes | None = None
    try:
        try:
            inside = _start(
                box, ["-c", _RUNNER, str(cpu), str(MEMORY), str(PROCESSES)], asked, answered
            )
            judge = subprocess.Popen(
                [
                    python(),
                    "-I",
                    "-S",
                    "-B",
                    "-c",
                    _JUDGE,
                    str(answers),
                    str(asks),
                    str(cpu),
                    str(MEMORY),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=(answers, asks),
                env={},
                cwd="/",
            )
        finally:
            for fd in (asked, asks, answers, answered):  # so that each side sees the other end
                os.close(fd)
        out = judge.communicate(job, timeout=max(deadline - time.monotonic(), 0.0))[0]
    except subprocess.TimeoutExpired:
        out = None
    finally:
        if judge is not None:
            _close(judge)
        errors = "" if inside is None else _end(inside, box.level)
    return out, errors


def _start(box: Box, arguments: list[str], stdin: int, stdout: int) -> subprocess.Popen:
    return subprocess.Popen(
        [*box.command, *arguments],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=BOX_ENVIRONMENT if box.level == "none" else ENVIRONMENT,
        cwd="/",
        start_new_session=True,
    )


def _end(outer: subprocess.Popen, level: str) -> str:
    """Ends a box and all in it, and gives the last line that it wrote while it was set up.

    `outer` is bwrap or unshare, outside; its child is process 1 of the box, with which all others end, before `outer`
    can reap it. Killing `outer` first would leave that child to the machine's init, which in a container may not reap.
    """
    until = time.monotonic() + 5
    if level == "none":  # the solution itself; what left its process group stays
        _kill(-outer.pid)
    while outer.poll() is None:
        children = _children(outer.pid)
        for child in children:
            _kill(child)
        if not children or time.monotonic() > until:  # it has not begun, or it is ending
            _kill(-outer.pid)
        try:
            outer.wait(0.002)
        except subprocess.TimeoutExpired:
            continue
    return (_close(outer).decode("utf-8", "replace").strip().splitlines() or [""])[-1][:200]


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except (
        ProcessLookupError,
        PermissionError,
    ):  # PermissionError: a session of which only another user's is left
        return


def _children(process: int) -> list[int]:
    try:
        return [
            int(child)
            for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _close(process: subprocess.Popen) -> bytes:
    """Kills a process, reaps it and closes its pipes; gives what it wrote as errors."""
    process.kill()
    process.wait()
    errors = b"" if process.stderr is None else process.stderr.read()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:  # a job that it did not read
                continue
    return errors


def _box(allow_unsandboxed: bool) -> Box:
    """The best level that works, found once; EvalError where there is none and the caller did not allow that."""
    global _chosen
    if not sys.platform.startswith("linux"):
        raise EvalError(
            "the sandbox for model-written programs needs Linux; run this benchmark there"
        )
    with _lock:
        if _chosen is None:
            _chosen = next(
                (box for level in LEVELS if (box := find(level))), Box("none", [python(), *FLAGS])
            )
    if _chosen.level == "none" and not allow_unsandboxed:
        raise EvalError(
            "no sandbox works here to run model-written programs in: install bubblewrap (Debian: apt-get install "
            "bubblewrap) where user namespaces are allowed, or run them unprotected with --allow-unsandboxed"
        )
    return _chosen
