"""The judge runs a benchmark's tests in a box of its own, and asks the solution's for each value.

eval.sandbox.check starts it with the numbers of the channel's two ends and of a job as JSON, lets
it begin once both boxes are set up, and reads a verdict: {"passed": bool, "reason": text, "fault":
text if the tests themselves are broken}. The solution never sees the tests. What it sends is
decoded by a closed codec and compared here, where none of its code runs.
"""

import builtins
import json
import os
import sys
from collections.abc import Callable
from types import CodeType

from eval.sandbox.codec import decode_value, encode_value
from eval.sandbox.runner import (
    describe_exception,
    find_failed_line,
    limit_process,
    read_message,
    write_message,
)

# What a broken message can raise when it is read or decoded.
BROKEN = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    RecursionError,
    MemoryError,
    ArithmeticError,
)
_ENDED = "the program ended"
_INTRUDED = "the program wrote on the channel"


class Stop(BaseException):
    """The verdict is known. Not an Exception, so that no test catches it."""


class Fault(BaseException):
    """The tests cannot run, whatever the solution is."""


class Channel:
    """The channel to the box, and what came over it."""

    def __init__(self, source: int, sink: int) -> None:
        self.source, self.sink = source, sink
        self.calls = 0
        self.stopped: Stop | None = None
        self.raised: BaseException | None = None  # the solution's last exception
        self.raised_text = ""

    def make_stop(self, reason: str) -> Stop:
        """Return a Stop with the first reason of all: a test that swallows one does not pass."""
        self.stopped = self.stopped or Stop(reason)
        return self.stopped

    def send_message(self, message: object) -> None:
        """Send a message.

        Raises:
            Stop: the program ended.
        """
        try:
            write_message(self.sink, message)
        except BrokenPipeError:
            raise self.make_stop(_ENDED) from None

    def receive_message(self) -> list:
        """Return the next message of a known kind.

        Raises:
            Stop: the program failed, ended or sent something else.
        """
        try:
            message = read_message(self.source)
        except EOFError:
            raise self.make_stop(_ENDED) from None
        except BROKEN:
            raise self.make_stop(_INTRUDED) from None
        match message:
            case ["failed", str(reason)]:
                raise self.make_stop(reason)
            case ["started"] | ["ready"] | ["value", _] | ["raised", str(), str()]:
                return message
            case ["passed", str()]:
                return message
        raise self.make_stop(_INTRUDED)

    def make_function(self) -> Callable[..., object]:
        """Return what the tests call in the place of the solution's function."""

        def call_solution(*arguments: object, **keywords: object) -> object:
            self.calls += 1
            if self.stopped:
                raise self.stopped
            try:
                plain = [encode_value(arguments, strict=True), encode_value(keywords, strict=True)]
            except TypeError as error:
                raise Fault(
                    f"the tests pass {error}, which is no plain data; run them with in_box=True"
                ) from None
            self.send_message(["call", *plain])
            match self.receive_message():
                case ["value", data]:
                    try:
                        return decode_value(data)
                    except BROKEN:
                        raise self.make_stop(_INTRUDED) from None
                case ["raised", name, text]:
                    raise self.make_exception(name, text)
            raise self.make_stop(_INTRUDED)

        return call_solution

    def make_exception(self, name: str, text: str) -> BaseException:
        """Return the solution's exception, of the same builtin class, for tests that expect one."""
        kind = getattr(builtins, name, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            return self.make_stop(text)
        self.raised_text = text
        try:
            self.raised = kind(text)
        except TypeError:  # UnicodeDecodeError takes five arguments
            self.raised = ValueError(text)
        return self.raised


def judge_solution(channel: Channel, job: dict[str, object]) -> str | None:
    """Run the tests, here or in the box as the job says.

    Returns:
        None if the solution passes, else why not.

    Raises:
        Stop: the program ended or broke the channel.
        Fault: the tests cannot run.
    """
    channel.send_message([job["solution"], job["entry_point"]])
    # Compiled and set up while the solution is imported in the box.
    names: dict[str, object] = {"__name__": "tests"}
    tests = _prepare_tests(job, names)
    if channel.receive_message() != ["ready"]:
        raise channel.make_stop(_INTRUDED)
    if job["in_box"]:
        token = os.urandom(16).hex()  # the secrets module would take 10 ms to import
        channel.send_message(["tests", job["setup"], job["tests"], token])
        return None if channel.receive_message() == ["passed", token] else _INTRUDED
    names[job["entry_point"]] = channel.make_function()
    try:
        exec(tests, names)
    except Exception as error:  # noqa: BLE001 (a test fails with any exception)
        if error is channel.raised:
            return channel.raised_text
        why = "" if isinstance(error, AssertionError) else f" ({describe_exception(error)})"
        return f"wrong answer: {find_failed_line(error, job['tests'])}{why}"
    # The tests ended, but they may have caught a Stop.
    if channel.stopped:
        raise channel.stopped
    if not channel.calls:
        raise Fault(f"the tests never call {job['entry_point']}")
    return None


def _prepare_tests(job: dict[str, object], names: dict[str, object]) -> CodeType:
    """Compile the tests, and run their setup in `names` unless it belongs in the box."""
    part = "setup"
    try:
        setup = compile(job["setup"], "<setup>", "exec")
        if not job["in_box"]:
            exec(setup, names)
        part = "tests"
        return compile(job["tests"], "<tests>", "exec")
    except Exception as error:
        text = describe_exception(error)
        raise Fault(f"the {part} of {job['entry_point']}: {text}") from error


def main() -> None:
    """Judge a job, and write the verdict to standard output.

    Its arguments are the descriptors of the channel's two ends and of the job, and its limits.
    """
    source, sink, given, *limits = map(int, sys.argv[1:])
    limit_process(*limits)
    verdicts = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):  # apart from what the tests print
        os.dup2(null, fd)
    channel = Channel(source, sink)
    try:
        channel.receive_message()  # ["started"]
    except Stop:  # the box did not start, which its own message tells
        os._exit(1)
    os.write(verdicts, b"started\n")
    if not os.read(0, 1):  # the caller has ended
        os._exit(1)
    with open(given, "rb") as file:
        job = json.load(file)
    verdict: dict[str, object] = {"passed": False, "reason": "passed", "fault": ""}
    try:
        why = judge_solution(channel, job)
        verdict |= {"passed": True} if why is None else {"reason": why}
    except Stop as stop:
        verdict["reason"] = str(stop)
    except Fault as fault:
        verdict["fault"] = str(fault)
    with os.fdopen(verdicts, "w") as file:
        json.dump(verdict, file)
    os._exit(0)  # no clean-up of what the solution sent
