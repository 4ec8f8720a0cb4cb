"""Run programs that a model wrote against a benchmark's tests, in a box that they cannot leave.

A check is two processes, each in a box of its own: no network, no files but a read-only /usr and
the interpreter, no other processes, and limits on everything. The solution runs in one
(eval.sandbox.runner). The tests run in the other, in a judge (eval.sandbox.judge), which calls the
solution's function over a pipe and compares plain data. So exit codes, prints and objects that
claim to be equal do not make a pass, and a benchmark's file can do this machine no more harm than a
solution can.

The boxes are bubblewrap's or, if that is missing, made with util-linux's `unshare`. A flaw in the
kernel opens both: for programs that are made to attack, use a virtual machine. Tests that need the
solution's own objects run in the solution's box, after it. They are isolated too, but a solution
that is made for it can forge their verdict.
"""

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from subprocess import PIPE
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

from eval.errors import EvalError
from eval.sandbox import codec, judge, runner
from eval.sandbox.box import (
    UNPROTECTED,
    Box,
    choose_box,
    get_interpreter,
    start_box,
    write_code,
)
from eval.sandbox.watch import POLL, Watch

MEMORY = 1 << 30  # bytes: a process' address space, and what a whole box may have
PROCESSES = 16  # of the solution, and of the judge, threads included
START = 60.0  # seconds in which the boxes are set up, by the clock
CHECKER_MEMORY = 4 << 30  # bytes, for `run_in_box`
MAX_REASON = 200  # characters
MAX_ANSWER = 64 << 10  # bytes of the judge's answer
_STARTED = b"started\n"


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
    # Run the tests in the solution's box, because they need its own classes.
    in_box: bool = False
    # Seconds that the solution may use, see eval.sandbox.watch. The tests may use as many.
    timeout: float = 10.0


def check_program(job: Job, box: Box | None = None) -> Verdict:
    """Run one program against its tests. May be called in any thread or process.

    Args:
        box: what the solution runs in; by default what `choose_box` returns.

    Raises:
        EvalError: no box works here, the box did not start, or the tests cannot run whatever the
            solution is.
    """
    box = box or choose_box()
    isolation = box.isolation + (", tests in the box" if job.in_box else "")
    with os.fdopen(_write_job(job), "rb") as given:
        boxes = _Boxes(box, job.timeout, given.fileno())
        try:
            if not boxes.wait_for_start():
                raise EvalError(
                    f"the sandbox ({box.level}) did not start: {boxes.end() or 'no message'}; "
                    "see if memory is short"
                )
            answer, excess = boxes.wait_for_answer()
        finally:
            boxes.end()
    if excess:
        return Verdict(False, excess, isolation)
    verdict = _read_verdict(answer)
    if verdict is None:
        return Verdict(False, "the judge could not read its answers", isolation)
    if verdict["fault"]:
        raise EvalError(_make_printable(verdict["fault"]))
    return Verdict(verdict["passed"], _make_printable(verdict["reason"]), isolation)


def _write_job(job: Job) -> int:
    """Return a descriptor of the job as JSON, at its start."""
    fields = job._asdict()
    del fields["timeout"]
    fd = os.memfd_create("job")
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(json.dumps(fields).encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _read_verdict(answer: bytes) -> dict[str, Any] | None:
    """Return the judge's verdict, or None if it is none: the tests may have written it."""
    try:
        verdict = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    kinds = {"passed": bool, "reason": str, "fault": str}
    if not isinstance(verdict, dict) or verdict.keys() != kinds.keys():
        return None
    if not all(isinstance(verdict[name], kind) for name, kind in kinds.items()):
        return None
    return verdict


def _make_printable(reason: str) -> str:
    """Return one line that a terminal can show: the reason may hold the solution's text."""
    line = " ".join(reason.split())
    return "".join(c if c.isprintable() else "?" for c in line)[:MAX_REASON]


def check_programs(
    jobs: Iterable[Job], *, box: Box | None = None
) -> Generator[Verdict, None, None]:
    """Run programs against their tests, as many at a time as there are processors.

    Yields:
        The verdicts, in the order of `jobs`, each as soon as it and those before it are known.

    Raises:
        EvalError: see `check_program`.
    """
    check = partial(check_program, box=box or choose_box())
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            yield from pool.map(check, jobs)
        # After an interrupt or an error, or if the caller stops, no further program starts.
        except BaseException:
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
        inside = start_box(box, program, stdin=given, stdout=out, stderr=subprocess.DEVNULL)
        try:
            watch = Watch(inside.pid, timeout, CHECKER_MEMORY)
            while True:
                try:
                    inside.wait(POLL)
                    break
                except subprocess.TimeoutExpired:
                    if watch.find_excess():
                        return None
        finally:
            _end_box(inside, box.level)
        out.seek(0)
        return out.read()


class _Boxes:
    """The two boxes of a check: the solution's and the judge's."""

    def __init__(self, box: Box, timeout: float, job: int) -> None:
        self.level, self.timeout = box.level, timeout
        self.running: list[subprocess.Popen] = []
        self.errors: list[str] = []  # what they wrote while they were set up
        # The watch comes first. The limit on processor time ends what could not be killed.
        limits = [str(int(timeout) + 2), str(MEMORY), str(PROCESSES)]
        asked, asks = os.pipe()  # from the judge to the solution
        answers, answered = os.pipe()  # and back
        try:
            is_ours = get_interpreter() in box.command
            program = _make_program(runner.__name__, is_ours)
            inside = start_box(box, program, *limits, stdin=asked, stdout=answered, stderr=PIPE)
            self.running.append(inside)
            program = _make_program(judge.__name__, is_ours)
            fds = (answers, asks, job)
            numbers = [*map(str, fds), *limits]
            judging = start_box(
                box, program, *numbers, stdin=PIPE, stdout=PIPE, stderr=PIPE, pass_fds=fds
            )
            self.running.append(judging)
        except BaseException:
            self.end()
            raise
        finally:
            # Each end is open in one box only, so each side notices when the other ends.
            for fd in (asked, asks, answers, answered):
                os.close(fd)

    def wait_for_start(self) -> bool:
        """Return whether both boxes are set up, and let the judge begin.

        The judge waits for this: until a box is set up, its processes are not bound to this one and
        outlive it, but no program runs in it yet.
        """
        judging = self.running[1]
        until = time.monotonic() + START
        told = b""
        while told != _STARTED:
            if not _can_read(judging.stdout, until - time.monotonic()):
                return False
            part = os.read(judging.stdout.fileno(), len(_STARTED) - len(told))
            if not part:
                return False
            told += part
        try:
            os.write(judging.stdin.fileno(), b"\n")
        except BrokenPipeError:
            return False
        return True

    def wait_for_answer(self) -> tuple[bytes, str]:
        """Return the judge's answer, and the limit that was exceeded before it came, or ""."""
        inside, judging = self.running
        watches = (
            Watch(inside.pid, self.timeout, MEMORY, partners=[judging.pid]),
            Watch(judging.pid, self.timeout, MEMORY, partners=[inside.pid]),
        )
        answer, look = bytearray(), time.monotonic() + POLL
        while len(answer) <= MAX_ANSWER:
            left = look - time.monotonic()
            if left <= 0:
                for watch in watches:
                    if excess := watch.find_excess():
                        return b"", excess
                look = time.monotonic() + POLL
            elif _can_read(judging.stdout, left):
                part = os.read(judging.stdout.fileno(), MAX_ANSWER)
                if not part:
                    break
                answer += part
        return bytes(answer), ""

    def end(self) -> str:
        """End both boxes and all processes in them; return what they wrote while set up."""
        for outer in self.running:
            for child in _list_children(outer.pid):
                _kill_process(child)
        self.errors += [_end_box(outer, self.level) for outer in self.running]
        self.running = []
        return " ".join(filter(None, self.errors))


def _can_read(file: IO[bytes], seconds: float) -> bool:
    """Wait until there is something to read, or the end of the file."""
    poll = select.poll()  # select.select takes no descriptor above 1023
    poll.register(file, select.POLLIN)
    return bool(poll.poll(max(seconds, 0.0) * 1000))


@cache
def _make_program(main: str, is_ours: bool) -> str:
    """Return a program that runs `main` of one of our modules: a box does not see their files."""
    lines = ["import sys"]
    for module in (codec, runner, judge):
        name, text = module.__name__, Path(module.__file__).read_text(encoding="utf-8")
        lines += [
            f"module = sys.modules[{name!r}] = type(sys)({name!r})",
            f"exec({write_code(text, is_ours, name)}, module.__dict__)",
        ]
        if name == main:
            break
    return "\n".join([*lines, "module.main()"])


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
