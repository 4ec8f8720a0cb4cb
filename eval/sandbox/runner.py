"""The program in the solution's box: it runs it, and answers calls of one of its functions.

eval.sandbox.check passes this file's text to `python -c`, after that of eval.sandbox.codec, so it
imports nothing else of this repository; eval.sandbox.judge, in a box of its own, imports the same
codec and channel. Neither imports what it can do without: an import of `typing` takes 3 ms a
program. A message is its length in 4 bytes, and JSON. Messages out are ["started"], then ["ready"],
and for each ["call", arguments, keywords] either ["value", x] or ["raised", name of a builtin
exception, text]; ["failed", text] at any time. Nothing that is sent from here is believed: it is
data, and the judge compares it.
"""

import builtins
import json
import os
import resource
import sys

from eval.sandbox.codec import decode_value, encode_value

MAX_MESSAGE = 8 << 20  # bytes
MAX_FILE = 16 << 20  # bytes
# Kept under other names, because a solution may replace the builtins.
_compile, _exec = compile, exec


def write_message(fd: int, message: object) -> None:
    """Send one message.

    Raises:
        ValueError: it is longer than MAX_MESSAGE.
    """
    data = json.dumps(message).encode("ascii")  # lone surrogates become \\uXXXX
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"a value of more than {MAX_MESSAGE} bytes")
    data = len(data).to_bytes(4, "big") + data
    while data:
        data = data[os.write(fd, data) :]


def read_message(fd: int) -> object:
    """Return the next message.

    Raises:
        EOFError: there is none.
        ValueError, RecursionError: what comes is not a message.
    """
    size = int.from_bytes(_read_bytes(fd, 4), "big")
    if size > MAX_MESSAGE:
        raise ValueError("a message that is too long")
    return json.loads(_read_bytes(fd, size))


def _read_bytes(fd: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = os.read(fd, size - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def limit_process(cpu_seconds: int, memory: int, processes: int) -> None:
    """Limit this process for good. `memory` is in bytes of address space."""
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: MAX_FILE,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: processes,
    }
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def describe_exception(error: BaseException) -> str:
    """Describe an exception in a few words. It may be the solution's own, whose text may fail."""
    if isinstance(error, SyntaxError):
        return f"syntax error: {error.msg} (line {error.lineno})"
    if isinstance(error, SystemExit):
        return "the program ended"
    try:
        text = str(error)[:200]
    except Exception:  # noqa: BLE001 (the solution's own __str__)
        text = ""
    return f"raised {type(error).__name__}" + (f": {text}" if text else "")


def _find_builtin_name(error: BaseException) -> str:
    """Return the name of the nearest builtin class, which the tests may catch."""
    return next(
        kind.__name__ for kind in type(error).__mro__ if vars(builtins).get(kind.__name__) is kind
    )


def serve_solution(source: int, sink: int) -> None:
    """Run the solution in the first message, then serve the judge until it closes the channel."""
    text, entry_point = read_message(source)
    # The module is not __main__: what a program does as a script is not part of the task.
    module = type(sys)("solution")
    sys.modules["solution"] = module
    try:
        _exec(_compile(text, "<solution>", "exec"), module.__dict__)
    except BaseException as error:  # noqa: BLE001 (sys.exit is an answer too)
        return write_message(sink, ["failed", describe_exception(error)])
    function = module.__dict__.get(entry_point)
    if not callable(function):
        return write_message(sink, ["failed", f"no function named {entry_point}"])
    write_message(sink, ["ready"])
    while True:
        request, *rest = read_message(source)
        if request == "tests":
            return write_message(sink, _run_tests(module.__dict__, *rest))
        arguments, keywords = map(decode_value, rest)
        try:
            value = function(*arguments, **keywords)
            write_message(sink, ["value", encode_value(value)])
        except BaseException as error:  # noqa: BLE001 (sys.exit is an answer too)
            name, text = _find_builtin_name(error), describe_exception(error)
            write_message(sink, ["raised", name, text])


def _run_tests(names: dict, setup: str, tests: str, token: str) -> list:
    """Run tests that need the solution's own objects.

    Args:
        token: what to send if they pass; it came after the solution had run.
    """
    try:
        _exec(_compile(setup, "<setup>", "exec"), names)
        _exec(_compile(tests, "<tests>", "exec"), names)
    except AssertionError as error:
        return ["failed", f"wrong answer: {find_failed_line(error, tests)}"]
    except BaseException as error:  # noqa: BLE001 (sys.exit is an answer too)
        return ["failed", describe_exception(error)]
    return ["passed", token]


def find_failed_line(error: BaseException, tests: str) -> str:
    """Return the innermost line of `tests` that `error` passed through."""
    number, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            number = trace.tb_lineno
        trace = trace.tb_next
    lines = tests.splitlines()
    return lines[number - 1].strip() if 0 < number <= len(lines) else "the tests"


def main() -> None:
    """Serve a solution over standard input and output, which the solution itself does not get."""
    source, sink = os.dup(0), os.dup(1)  # not inherited by what the solution forks and executes
    for fd, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        null = os.open(os.devnull, mode)
        os.dup2(null, fd)
        os.close(null)
    limit_process(*map(int, sys.argv[1:4]))
    write_message(sink, ["started"])
    try:
        serve_solution(source, sink)
    except (EOFError, BrokenPipeError):  # the judge has its verdict
        pass
    finally:
        os._exit(0)  # no atexit functions or threads of the solution's


if __name__ == "__main__":
    main()
