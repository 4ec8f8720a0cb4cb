"""Run programs that a model wrote against a benchmark's tests, in a box that they cannot leave.

A check is two processes. The solution runs in the box (eval.sandbox.runner): no network, no files
but a read-only /usr and the interpreter, no other processes, and limits on everything. The tests
run outside of it, in a judge (eval.sandbox.judge), which calls the solution's function over a pipe
and compares plain data. So exit codes, prints and objects that claim to be equal do not make a
pass.

The box is bubblewrap's or, if that is missing, one of util-linux's `unshare`. A flaw in the kernel
opens both: for programs that are made to attack, use a virtual machine. Tests that need the
solution's own objects run in the box, after the solution. They are isolated too, but a solution
that is made for it can forge their verdict.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

from eval.errors import EvalError
from eval.sandbox import codec, judge, runner
from eval.sandbox.box import (
    BOX_ENVIRONMENT,
    ENVIRONMENT,
    PYTHON_FLAGS,
    UNPROTECTED,
    Box,
    choose_box,
    get_interpreter,
)

MEMORY = 1 << 30  # bytes of address space, for the solution and for the judge
PROCESSES = 32  # of the solution, threads included
MAX_REASON = 200  # characters
_ROOT = str(Path(__file__).resolve().parents[2])
# The import of judge and runner above compiles them, which spares each judge process 10 ms.
_JUDGE = f"import sys; sys.path.append({_ROOT!r}); from {judge.__name__} import main; main()"
# In the box there is no such package: the codec's module is made there from its text.
_RUNNER = (
    f"import sys\ncodec = sys.modules[{codec.__name__!r}] = type(sys)({codec.__name__!r})\n"
    f"exec({Path(codec.__file__).read_text(encoding='utf-8')!r}, codec.__dict__)\n"
    f"{Path(runner.__file__).read_text(encoding='utf-8')}"
)


class Verdict(NamedTuple):
    """Whether a program passed, and why not."""

    passed: bool
    reason: str  # "passed", or why not, in one line; part of it may be the solution's own text
    isolation: str  # level of the box, and "tests in the box" if they ran there


class Job(NamedTuple):
    """A program and its tests."""

    solution: str  # a whole untrusted module
    tests: str  # calls the function `entry_point`, with plain data; passes if it does not raise
    entry_point: str
    setup: str = ""  # runs before the tests, where they run
    in_box: bool = False  # run the tests in the box, because they need the solution's own classes
    timeout: float = 10.0  # seconds for all that the solution and the tests do


def check_program(job: Job, box: Box | None = None) -> Verdict:
    """Run one program against its tests. May be called in any thread or process.

    Args:
        box: what the solution runs in; by default what `choose_box` returns.

    Raises:
        EvalError: no box works here, the box did not start, or the tests cannot run whatever the
            solution is.
    """
    box = box or choose_box()
    isolation = box.level + (", tests in the box" if job.in_box else "")
    deadline = time.monotonic() + job.timeout
    # The deadline comes first. The limit on CPU time ends what could not be killed.
    cpu_seconds = int(job.timeout) + 2
    answer, errors = _run_judge(box, _encode_job(job), cpu_seconds, deadline)
    if answer is None:
        return Verdict(False, f"timed out after {job.timeout:g} s", isolation)
    if not answer:
        return Verdict(False, "the judge could not read its answers", isolation)
    verdict = json.loads(answer)
    if verdict["fault"]:
        raise EvalError(verdict["fault"])
    if not verdict["started"]:
        raise EvalError(
            f"the sandbox ({box.level}) did not start: {errors or 'no message'}; "
            "see if memory is short"
        )
    return Verdict(verdict["passed"], _make_printable(verdict["reason"]), isolation)


def _encode_job(job: Job) -> bytes:
    fields = job._asdict()
    del fields["timeout"]
    return json.dumps(fields).encode()


def _make_printable(reason: str) -> str:
    """Return one line that a terminal can show: the reason may hold the solution's text."""
    line = " ".join(reason.split())
    return "".join(c if c.isprintable() else "?" for c in line)[:MAX_REASON]


def check_programs(jobs: Iterable[Job], *, box: Box | None = None) -> list[Verdict]:
    """Run programs against their tests, as many at a time as there are processors, in order.

    Raises:
        EvalError: see `check_program`.
    """
    check = partial(check_program, box=box or choose_box())
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            return list(pool.map(check, jobs))
        except BaseException:  # after an interrupt or an error no further program starts
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def run_in_box(program: str, job: bytes, timeout: float, box: Box) -> bytes | None:
    """Run a Python program in a box of bubblewrap's, with `job` as its standard input.

    For a checker that runs what it checks in its own process. It is isolated like a solution, but
    sets its own limits. What it writes is no more to be trusted than what it runs.

    Returns:
        What it writes to standard output, or None if it does not end within `timeout` seconds.
    """
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
            _end_box(inside, box.level)
        out.seek(0)
        return out.read()


def _run_judge(box: Box, job: bytes, cpu_seconds: int, deadline: float) -> tuple[bytes | None, str]:
    """Start a box and a judge, and end both.

    Returns:
        The judge's answer, or None if it is late; and what the box wrote while it was set up.
    """
    asked, asks = os.pipe()  # from the judge to the solution
    answers, answered = os.pipe()  # and back
    inside = judging = None
    out: bytes | None = None
    try:
        try:
            inside = _start_box(box, cpu_seconds, asked, answered)
            judging = _start_judge(cpu_seconds, answers, asks)
        finally:
            # Each end is open in one process only, so each side notices when the other ends.
            for fd in (asked, asks, answers, answered):
                os.close(fd)
        out = judging.communicate(job, timeout=max(deadline - time.monotonic(), 0.0))[0]
    except subprocess.TimeoutExpired:
        out = None
    finally:
        if judging is not None:
            _close_process(judging)
        errors = "" if inside is None else _end_box(inside, box.level)
    return out, errors


def _start_box(box: Box, cpu_seconds: int, stdin: int, stdout: int) -> subprocess.Popen:
    return subprocess.Popen(
        [*box.command, "-c", _RUNNER, str(cpu_seconds), str(MEMORY), str(PROCESSES)],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=BOX_ENVIRONMENT if box.level == UNPROTECTED else ENVIRONMENT,
        cwd="/",
        start_new_session=True,
    )


def _start_judge(cpu_seconds: int, answers: int, asks: int) -> subprocess.Popen:
    arguments = [str(number) for number in (answers, asks, cpu_seconds, MEMORY)]
    return subprocess.Popen(
        [get_interpreter(), *PYTHON_FLAGS, "-c", _JUDGE, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=(answers, asks),
        env=BOX_ENVIRONMENT,  # its hashes are fixed too: a test may list a set
        cwd="/",
    )


def _end_box(outer: subprocess.Popen, level: str) -> str:
    """End a box and all processes in it.

    `outer` is bwrap or unshare, outside of the box. Its child is process 1 of the box: all others
    end with it, before `outer` can reap it. To kill `outer` first would leave that child to the
    machine's init, which in a container may not reap.

    Returns:
        The last line that the box wrote while it was set up.
    """
    until = time.monotonic() + 5
    if level == UNPROTECTED:  # the solution itself; processes that left its group stay
        _kill_process(-outer.pid)
    while outer.poll() is None:
        children = _list_children(outer.pid)
        for child in children:
            _kill_process(child)
        if not children or time.monotonic() > until:  # it has not begun, or it is ending
            _kill_process(-outer.pid)
        try:
            outer.wait(0.002)
        except subprocess.TimeoutExpired:
            continue
    lines = _close_process(outer).decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:MAX_REASON] if lines else ""


def _kill_process(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        # Without permission: a session of which only another user's processes are left.
        return


def _list_children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    try:
        return [int(child) for child in path.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _close_process(process: subprocess.Popen) -> bytes:
    """Kill a process, reap it and close its pipes; return what it wrote to standard error."""
    process.kill()
    process.wait()
    errors = b"" if process.stderr is None else process.stderr.read()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:  # a job that the judge did not read
                continue
    return errors
