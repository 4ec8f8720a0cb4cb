"""The judge: runs a benchmark's tests in a process of its own, outside the box, and asks the box for each value.

eval.sandbox.check starts it with the numbers of the channel's two ends, sends it a job as JSON and reads a verdict:
{"passed": bool, "reason": words, "started": whether the box did, "fault": words where the tests themselves are broken}.
The solution never sees the tests; what it sends is decoded by a closed codec and compared here, where none of its code
runs.
"""

import builtins
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from eval.sandbox.runner import decode, encode, failed_line, limit, read, said, write

_BROKEN = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    RecursionError,
    MemoryError,
    ArithmeticError,
)


class Stop(BaseException):
    """The verdict is known; not an Exception, so that no test catches it."""


class Fault(BaseException):
    """The tests cannot run, whatever the solution."""


class Channel:
    """The channel to the box."""

    def __init__(self, source: int, sink: int) -> None:
        self.source, self.sink = source, sink
        self.started = False
        self.calls = 0
        self.stopped: Stop | None = None
        self.raised: BaseException | None = None
        self.words = ""

    def stop(self, reason: str) -> Stop:
        """Remembers the first reason: a test that swallows it does not pass."""
        self.stopped = self.stopped or Stop(reason)
        return self.stopped

    def send(self, message: Any) -> None:
        try:
            write(self.sink, message)
        except BrokenPipeError:
            raise self.stop("the program ended") from None

    def receive(self) -> list:
        """The next message of a known kind, or Stop where it failed, ended or sent something else."""
        try:
            message = read(self.source)
        except EOFError:
            raise self.stop("the program ended") from None
        except _BROKEN:
            raise self.stop("the program wrote on the channel") from None
        match message:
            case ["failed", str(reason)]:
                raise self.stop(reason)
            case (
                ["ready"] | ["value", _] | ["raised", str(), str()] | ["passed", str()] | "started"
            ):
                return message
        raise self.stop("the program wrote on the channel")

    def function(self) -> Callable[..., Any]:
        """What the tests call in the place of the solution's function."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.calls += 1
            if self.stopped:
                raise self.stopped
            try:
                plain = [encode(arguments, strict=True), encode(keywords, strict=True)]
            except TypeError as error:
                raise Fault(
                    f"the tests pass {error}, which is no plain data; run them with in_box=True"
                ) from None
            self.send(["call", *plain])
            answer = self.receive()
            match answer:
                case ["value", data]:
                    try:
                        return decode(data)
                    except _BROKEN:
                        raise self.stop("the program wrote on the channel") from None
                case ["raised", name, words]:
                    raise self.error(name, words)
            raise self.stop("the program wrote on the channel")

        return call

    def error(self, name: str, words: str) -> BaseException:
        """The solution's exception, of the same builtin class, for tests that expect one."""
        kind = getattr(builtins, name, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            return self.stop(words)
        self.words = words
        try:
            self.raised = kind(words)
        except TypeError:  # UnicodeDecodeError takes five arguments
            self.raised = ValueError(words)
        return self.raised


def grade(channel: Channel, job: dict[str, Any]) -> str | None:
    """None if the solution passes, or why not. The tests run here, or in the box where the job says so.

    Raises Stop where the program ended or broke the channel, and Fault where the tests cannot run.
    """
    if channel.receive() != "started":
        raise channel.stop("the program wrote on the channel")
    channel.started = True
    channel.send([job["solution"], job["entry_point"]])
    names: dict[str, Any] = {"__name__": "tests"}
    codes = {}
    for part in ("setup", "tests"):
        try:
            codes[part] = compile(job[part], f"<{part}>", "exec")
            if part == "setup" and not job["in_box"]:
                exec(codes[part], names)
        except Exception as error:
            raise Fault(f"the {part} of {job['entry_point']}: {said(error)}") from error
    if channel.receive() != ["ready"]:
        raise channel.stop("the program wrote on the channel")
    if job["in_box"]:
        token = os.urandom(16).hex()  # the secrets module takes 10 ms to import
        channel.send(["tests", job["setup"], job["tests"], token])
        return (
            None if channel.receive() == ["passed", token] else "the program wrote on the channel"
        )
    names[job["entry_point"]] = channel.function()
    try:
        exec(codes["tests"], names)
    except Exception as error:  # noqa: BLE001 (a test fails with any exception)
        if error is channel.raised:
            return channel.words
        why = "" if isinstance(error, AssertionError) else f" ({said(error)})"
        return f"wrong answer: {failed_line(error, job['tests'])}{why}"
    if channel.stopped:
        raise channel.stopped
    if not channel.calls:
        raise Fault(f"the tests never call {job['entry_point']}")
    return None


def main() -> None:
    source, sink, cpu, memory = map(int, sys.argv[1:5])
    limit(cpu, memory)
    verdicts = os.dup(1)  # apart from what the tests print
    os.dup2(2, 1)
    job = json.loads(sys.stdin.buffer.read())
    channel = Channel(source, sink)
    verdict: dict[str, Any] = {"passed": False, "reason": "passed", "fault": ""}
    try:
        why = grade(channel, job)
        verdict |= {"passed": True} if why is None else {"reason": why}
    except Stop as stop:
        verdict["reason"] = str(stop)
    except Fault as fault:
        verdict["fault"] = str(fault)
    with os.fdopen(verdicts, "w") as file:
        json.dump(verdict | {"started": channel.started}, file)
    os._exit(0)  # no clean-up of what the solution sent
