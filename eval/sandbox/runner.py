"""The program inside the box: runs an untrusted solution and answers calls of one of its functions as plain data.

eval.sandbox.check passes this file's text to `python -c`, so it imports nothing of this repository; eval.sandbox.judge,
outside the box, imports the same codec and channel. A message is its length in 4 bytes and JSON. Out go "started", then
["ready"], and for each ["call", arguments, keywords] a ["value", x] or ["raised", a builtin exception's name, words],
or at any time ["failed", words]. Nothing that is sent from here is believed: it is data, and the judge compares it.
"""

import builtins
import collections
import itertools
import json
import os
import resource
import sys
from typing import Any

DEPTH = 100  # nested containers
SIZE = 8 << 20  # bytes of one message
ITEMS = 100_000  # of an iterator, which may be endless
_SEQUENCES = {
    list: "list",
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
    collections.deque: "deque",
}
_MAPPINGS = {
    dict: "dict",
    collections.defaultdict: "dict",
    collections.OrderedDict: "OrderedDict",
    collections.Counter: "Counter",
}
_SEQUENCE_OF = {tag: kind for kind, tag in _SEQUENCES.items()} | {
    "iterator": lambda items: iter(list(items)),
    "keys": lambda items: dict.fromkeys(items).keys(),
    "values": lambda items: dict(enumerate(items)).values(),
}
_MAPPING_OF = {
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "Counter": collections.Counter,
} | {"items": lambda pairs: dict(pairs).items()}
_compile, _exec = compile, exec  # these, also after a solution has put others in their place


class Opaque:
    """What a value that is no plain data arrives as: something, and equal to nothing."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


def encode(value: Any, strict: bool = False, depth: int = 0) -> Any:
    """`value` as JSON can hold it, by exact type; other objects as ["opaque"], or a TypeError where `strict`.

    ValueError where it is nested deeper than DEPTH or came as ["opaque"] itself.
    """
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if (
        kind is int
    ):  # in hexadecimal where it is long: decimal digits take quadratic time, and Python refuses 4301
        return value if value.bit_length() < 64 else ["int", hex(value)]
    if depth > DEPTH:
        raise ValueError(f"a value nested deeper than {DEPTH}")

    def each(items: Any) -> list:
        return [encode(item, strict, depth + 1) for item in items]

    if kind in _SEQUENCES:
        return [_SEQUENCES[kind], *each(value)]
    if kind in _MAPPINGS:
        return [_MAPPINGS[kind], *map(each, dict.items(value))]
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind is range:
        return ["range", *each((value.start, value.stop, value.step))]
    if kind is type({}.keys()):
        return ["keys", *each(value)]
    if kind is type({}.values()):
        return ["values", *each(value)]
    if kind is type({}.items()):
        return ["items", *map(each, value)]
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):  # a namedtuple equals the tuple
        return ["tuple", *each(tuple.__iter__(value))]
    if hasattr(kind, "__next__"):
        return ["iterator", *each(itertools.islice(value, ITEMS))]
    if kind is Opaque:  # a test passes on what the solution gave
        raise ValueError("a value that is no plain data")
    if strict:
        raise TypeError(f"a {kind.__name__}")
    return ["opaque"]


def decode(data: Any, depth: int = 0) -> Any:
    """The value that `encode` gave as `data`; ValueError or TypeError for anything that it cannot have given."""
    if data is None or type(data) in (bool, str, int, float):
        return data
    if type(data) is not list or not data or depth > DEPTH:
        raise ValueError("no encoded value")
    tag, *items = data
    if not isinstance(tag, str):
        raise ValueError("no encoded value")
    if tag in _SEQUENCE_OF:
        return _SEQUENCE_OF[tag](decode(item, depth + 1) for item in items)
    if tag in _MAPPING_OF:
        pairs = [(decode(key, depth + 1), decode(value, depth + 1)) for key, value in items]
        return _MAPPING_OF[tag](dict(pairs))
    match data:
        case ["int", str(text)]:
            return int(text, 16)
        case ["complex", float(real), float(imaginary)]:
            return complex(real, imaginary)
        case ["bytes", str(text)]:
            return bytes.fromhex(text)
        case ["range", start, stop, step]:
            return range(*(decode(item, depth + 1) for item in (start, stop, step)))
        case ["opaque"]:
            return Opaque()
    raise ValueError("no encoded value")


def write(fd: int, message: Any) -> None:
    """Sends one message; ValueError where it is longer than SIZE."""
    data = json.dumps(message).encode("ascii")  # lone surrogates as \\uXXXX
    if len(data) > SIZE:
        raise ValueError(f"a value of more than {SIZE} bytes")
    data = len(data).to_bytes(4, "big") + data
    while data:
        data = data[os.write(fd, data) :]


def read(fd: int) -> Any:
    """The next message; EOFError where there is none, ValueError or RecursionError where it is no message."""
    size = int.from_bytes(_exactly(fd, 4), "big")
    if size > SIZE:
        raise ValueError("a message that is too long")
    return json.loads(_exactly(fd, size))


def _exactly(fd: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = os.read(fd, size - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def limit(cpu: int, memory: int, processes: int | None = None) -> None:
    """Bounds this process for good: `cpu` in seconds, `memory` in bytes of address space."""
    limits = {
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: 16 << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if processes is not None:
        limits[resource.RLIMIT_NPROC] = processes
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def said(error: BaseException) -> str:
    """An exception in a few words; it may be of the solution's own class, and its text may fail."""
    if isinstance(error, SyntaxError):
        return f"syntax error: {error.msg} (line {error.lineno})"
    if isinstance(error, SystemExit):
        return "the program ended"
    try:
        text = str(error)[:200]
    except Exception:  # noqa: BLE001 (the solution's own __str__)
        text = ""
    return f"raised {type(error).__name__}" + (f": {text}" if text else "")


def _builtin_name(error: BaseException) -> str:
    """The nearest builtin class, which the tests may catch."""
    return next(
        kind.__name__ for kind in type(error).__mro__ if vars(builtins).get(kind.__name__) is kind
    )


def serve(source: int, sink: int) -> None:
    """Runs the solution that the first message holds, then what the judge asks for, until it closes the channel."""
    text, entry_point = read(source)
    module = type(sys)(
        "solution"
    )  # not __main__: what a program does as a script is no part of the task
    sys.modules["solution"] = module
    try:
        _exec(_compile(text, "<solution>", "exec"), module.__dict__)
    except BaseException as error:  # noqa: BLE001 (sys.exit too is an answer)
        return write(sink, ["failed", said(error)])
    function = module.__dict__.get(entry_point)
    if not callable(function):
        return write(sink, ["failed", f"no function named {entry_point}"])
    write(sink, ["ready"])
    while True:
        what, *rest = read(source)
        if what == "tests":
            return write(sink, _tests_here(module.__dict__, *rest))
        arguments, keywords = map(decode, rest)
        try:
            value = function(*arguments, **keywords)
            write(sink, ["value", encode(value)])
        except BaseException as error:  # noqa: BLE001 (sys.exit too is an answer)
            write(sink, ["raised", _builtin_name(error), said(error)])


def _tests_here(names: dict, setup: str, tests: str, token: str) -> list:
    """Tests that need the solution's own objects. The token came after the solution had run, and passes if they do."""
    try:
        _exec(_compile(setup, "<setup>", "exec"), names)
        _exec(_compile(tests, "<tests>", "exec"), names)
    except AssertionError as error:
        return ["failed", f"wrong answer: {failed_line(error, tests)}"]
    except BaseException as error:  # noqa: BLE001
        return ["failed", said(error)]
    return ["passed", token]


def failed_line(error: BaseException, tests: str) -> str:
    """The line of `tests` in which `error` arose, the innermost."""
    lines, number, trace = tests.splitlines(), 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            number = trace.tb_lineno
        trace = trace.tb_next
    return lines[number - 1].strip() if 0 < number <= len(lines) else "the tests"


def main() -> None:
    # What the solution prints goes nowhere, and what it reads is empty; fork and exec do not pass the channel on.
    source, sink = os.dup(0), os.dup(1)
    for fd, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        null = os.open(os.devnull, mode)
        os.dup2(null, fd)
        os.close(null)
    limit(*map(int, sys.argv[1:4]))
    write(sink, "started")
    try:
        serve(source, sink)
    except (EOFError, BrokenPipeError):  # the judge has its verdict
        pass
    finally:
        os._exit(0)  # no atexit or threads of the solution's


if __name__ == "__main__":
    main()
