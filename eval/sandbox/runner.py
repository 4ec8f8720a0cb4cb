"""The program in the box: it runs an untrusted solution and answers calls of one of its functions.

eval.sandbox.check passes this file's text to `python -c`, so it imports nothing of this repository;
eval.sandbox.judge, outside the box, imports the same codec and channel. A message is its length in
4 bytes, and JSON. Messages out are "started", then ["ready"], and for each ["call", arguments,
keywords] either ["value", x] or ["raised", name of a builtin exception, text]; ["failed", text] at
any time. Nothing that is sent from here is believed: it is data, and the judge compares it.
"""

import builtins
import collections
import itertools
import json
import os
import resource
import sys
from typing import Any

MAX_DEPTH = 100  # nested containers
MAX_MESSAGE = 8 << 20  # bytes
MAX_ITEMS = 100_000  # of an iterator, which may be endless
MAX_FILE = 16 << 20  # bytes
_SEQUENCE_TAGS = {
    list: "list",
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
    collections.deque: "deque",
}
_MAPPING_TAGS = {
    dict: "dict",
    collections.defaultdict: "dict",
    collections.OrderedDict: "OrderedDict",
    collections.Counter: "Counter",
}
_MAKE_SEQUENCE = {tag: kind for kind, tag in _SEQUENCE_TAGS.items()} | {
    "iterator": lambda items: iter(list(items)),
    "keys": lambda items: dict.fromkeys(items).keys(),
    "values": lambda items: dict(enumerate(items)).values(),
}
_MAKE_MAPPING = {
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "Counter": collections.Counter,
    "items": lambda pairs: dict(pairs).items(),
}
# Kept under other names, because a solution may replace the builtins.
_compile, _exec = compile, exec


class Opaque:
    """What a value that is not plain data arrives as: an object, equal to nothing."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


def encode_value(value: Any, strict: bool = False, depth: int = 0) -> Any:
    """Return `value` in a form that JSON can hold, by its exact type.

    Other objects become ["opaque"].

    Raises:
        TypeError: `strict`, and there is another object.
        ValueError: `value` is nested deeper than MAX_DEPTH, or came as ["opaque"] itself.
    """
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind is int:
        # Long ones in hexadecimal: decimal digits take quadratic time, and Python refuses 4301.
        return value if value.bit_length() < 64 else ["int", hex(value)]
    if depth > MAX_DEPTH:
        raise ValueError(f"a value nested deeper than {MAX_DEPTH}")

    def encode_each(items: Any) -> list:
        return [encode_value(item, strict, depth + 1) for item in items]

    if kind in _SEQUENCE_TAGS:
        return [_SEQUENCE_TAGS[kind], *encode_each(value)]
    if kind in _MAPPING_TAGS:
        return [_MAPPING_TAGS[kind], *map(encode_each, dict.items(value))]
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind is range:
        return ["range", *encode_each((value.start, value.stop, value.step))]
    if kind is type({}.keys()):
        return ["keys", *encode_each(value)]
    if kind is type({}.values()):
        return ["values", *encode_each(value)]
    if kind is type({}.items()):
        return ["items", *map(encode_each, value)]
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):  # a namedtuple equals the tuple
        return ["tuple", *encode_each(tuple.__iter__(value))]
    if hasattr(kind, "__next__"):
        return ["iterator", *encode_each(itertools.islice(value, MAX_ITEMS))]
    if kind is Opaque:  # a test passes on what the solution gave
        raise ValueError("a value that is no plain data")
    if strict:
        raise TypeError(f"a {kind.__name__}")
    return ["opaque"]


def decode_value(data: Any, depth: int = 0) -> Any:
    """Return the value that `encode_value` gave as `data`.

    Raises:
        ValueError, TypeError: `encode_value` cannot have given `data`.
    """
    if data is None or type(data) in (bool, str, int, float):
        return data
    if type(data) is not list or not data or depth > MAX_DEPTH:
        raise ValueError("no encoded value")
    tag, *items = data
    if not isinstance(tag, str):
        raise ValueError("no encoded value")
    if tag in _MAKE_SEQUENCE:
        return _MAKE_SEQUENCE[tag](decode_value(item, depth + 1) for item in items)
    if tag in _MAKE_MAPPING:
        pairs = {}
        for key, value in items:
            decoded_key = decode_value(key, depth + 1)
            pairs[decoded_key] = decode_value(value, depth + 1)
        return _MAKE_MAPPING[tag](pairs)
    match data:
        case ["int", str(text)]:
            return int(text, 16)
        case ["complex", float(real), float(imaginary)]:
            return complex(real, imaginary)
        case ["bytes", str(text)]:
            return bytes.fromhex(text)
        case ["range", start, stop, step]:
            return range(*(decode_value(item, depth + 1) for item in (start, stop, step)))
        case ["opaque"]:
            return Opaque()
    raise ValueError("no encoded value")


def write_message(fd: int, message: Any) -> None:
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


def read_message(fd: int) -> Any:
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


def limit_process(cpu_seconds: int, memory: int, processes: int | None = None) -> None:
    """Limit this process for good. `memory` is in bytes of address space."""
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: MAX_FILE,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if processes is not None:
        limits[resource.RLIMIT_NPROC] = processes
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
    write_message(sink, "started")
    try:
        serve_solution(source, sink)
    except (EOFError, BrokenPipeError):  # the judge has its verdict
        pass
    finally:
        os._exit(0)  # no atexit functions or threads of the solution's


if __name__ == "__main__":
    main()
