"""Plain data as JSON: all that crosses between the solution's box and the judge's.

eval.sandbox.check sends this file's text into both boxes, so it imports nothing of this repository,
and only what every Python program has loaded anyway: each import costs every program its time.
Modules such as fractions are imported when a value of theirs comes.

A value keeps its exact type if that is a known one. A value of a subclass, or of a class that the
standard library compares with a known type (UserList, ChainMap), crosses as the known type if plain
Python holds the two equal, and as an opaque object if not. The receiver builds all values itself,
of known types, so no method of the sender's classes takes part in a comparison.
"""

import collections
import collections.abc
import itertools
import sys
from collections.abc import Callable, Iterable

MAX_DEPTH = 100  # nested containers
MAX_ITEMS = 100_000  # of an iterator, which may be endless
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
# How to copy a value of a subclass as its known type, by that type's own methods. The first that is
# found in the order of the subclass's bases counts: OrderedDict is a dict.
_COPIES: dict[type, Callable] = {
    int: int.__pos__,
    float: float.__pos__,
    complex: complex.__pos__,
    str: str.__str__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    bytearray: lambda value: bytearray.__getitem__(value, slice(None)),
    collections.OrderedDict: lambda value: collections.OrderedDict(
        collections.OrderedDict.items(value)
    ),
    collections.Counter: lambda value: collections.Counter(dict(dict.items(value))),
    collections.UserString: lambda value: str(value.data),
    dict: lambda value: dict(dict.items(value)),
    memoryview: bytes,
} | {kind: lambda value, kind=kind: kind(kind.__iter__(value)) for kind in _SEQUENCE_TAGS}


def _write_iso(value: object) -> tuple[str]:
    return (value.isoformat(),)  # without `fold`, which counts in no comparison of ours


# Other types of the standard library, by name: their module, the types of the arguments that make a
# value again, and how to find these. The types are checked when arguments arrive:
# Fraction(Decimal("1e999999999")), say, would take all memory. Decimal's text is exact.
_LIBRARY: dict[str, tuple[str, tuple[type, ...], Callable[..., tuple]]] = {
    "Fraction": ("fractions", (int, int), lambda value: (value.numerator, value.denominator)),
    "Decimal": ("decimal", (str,), lambda value: (str(value),)),
    "array": ("array", (str, list), lambda value: (value.typecode, value.tolist())),
    "timedelta": (
        "datetime",
        (int, int, int),
        lambda value: (value.days, value.seconds, value.microseconds),
    ),
    "date": ("datetime", (str,), _write_iso),
    "time": ("datetime", (str,), _write_iso),
    "datetime": ("datetime", (str,), _write_iso),
}


class Opaque:
    """What a value that is not plain data arrives as: an object, equal to nothing.

    Its truth is that of the value, or None if that has none.
    """

    def __init__(self, truth: bool | None) -> None:
        self.truth = truth

    def __eq__(self, other: object) -> bool:
        return False

    def __bool__(self) -> bool:
        if self.truth is None:
            raise TypeError("a value that is neither true nor false")
        return self.truth

    __hash__ = object.__hash__


def encode_value(value: object, strict: bool = False, depth: int = 0) -> object:
    """Return `value` in a form that JSON can hold.

    Args:
        strict: refuse values that would not arrive as what they are.

    Raises:
        TypeError: `strict`, and there is a value of another type than the known ones.
        ValueError: `value` is nested deeper than MAX_DEPTH, or came as an opaque object itself.
    """
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind is int:
        # Long ones in hexadecimal: decimal digits take quadratic time, and Python refuses 4301.
        return value if value.bit_length() < 64 else ["int", hex(value)]
    if depth > MAX_DEPTH:
        raise ValueError(f"a value nested deeper than {MAX_DEPTH}")

    def encode_each(items: Iterable) -> list:
        return [encode_value(item, strict, depth + 1) for item in items]

    if kind in _SEQUENCE_TAGS:
        return [_SEQUENCE_TAGS[kind], *encode_each(value)]
    if kind in _MAPPING_TAGS:
        return [_MAPPING_TAGS[kind], *map(encode_each, value.items())]
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind in (bytes, bytearray):
        return [kind.__name__, value.hex()]
    if kind is range:
        return ["range", *encode_each((value.start, value.stop, value.step))]
    if (name := _name_library_type(kind)) is not None:
        return [name, *encode_each(_take_apart(name, value))]
    if issubclass(kind, collections.abc.KeysView):
        return ["keys", *encode_each(value)]
    if issubclass(kind, collections.abc.ValuesView):
        return ["values", *encode_each(value)]
    if issubclass(kind, collections.abc.ItemsView):
        return ["items", *map(encode_each, value)]
    if kind is Opaque:  # a test passes on what the solution gave
        raise ValueError("a value that is no plain data")
    if hasattr(kind, "__next__"):
        return ["iterator", *encode_each(itertools.islice(value, MAX_ITEMS))]
    if strict:
        raise TypeError(f"a {kind.__name__}")
    plain = _copy_plainly(value, kind)
    if plain is None:
        return ["opaque", _find_truth(value)]
    return encode_value(plain, strict, depth)


def _name_library_type(kind: type) -> str | None:
    """Return the name in _LIBRARY of a type of the standard library, or None."""
    name = kind.__name__
    if name not in _LIBRARY:
        return None
    # A program may have a class of the same name.
    return name if getattr(sys.modules.get(_LIBRARY[name][0]), name, None) is kind else None


def _take_apart(name: str, value: object) -> tuple:
    """Return the arguments that make a value of a type in _LIBRARY again."""
    _, _, take_apart = _LIBRARY[name]
    return take_apart(value)


def _copy_plainly(value: object, kind: type) -> object:
    """Return a copy of `value` of a known type that plain Python holds equal, or None."""
    try:
        plain = _copy_as_base(value, kind)
        # A class may compare in a way of its own. If its values differ from their own copies, no
        # known type compares as they do.
        is_equal = plain is not None and (value == plain) is True and (value != plain) is False
        return plain if is_equal else None
    except Exception:  # noqa: BLE001 (the solution's own methods)
        return None


def _copy_as_base(value: object, kind: type) -> object:
    for base in kind.__mro__:
        if base in _COPIES:
            return _COPIES[base](value)
        if (name := _name_library_type(base)) is not None:
            return _make_library_value(name, _take_apart(name, value))
    if issubclass(kind, collections.abc.Mapping):
        return dict(value)
    if issubclass(kind, collections.abc.MutableSequence):
        return list(value)
    if issubclass(kind, collections.abc.Set):
        return set(value)
    return None


def _find_truth(value: object) -> bool | None:
    try:
        return bool(value)
    except Exception:  # noqa: BLE001 (the solution's own __bool__)
        return None


def decode_value(data: object, depth: int = 0) -> object:
    """Return the value that `encode_value` gave as `data`.

    Raises:
        ValueError, TypeError, ...: `encode_value` cannot have given `data`. Which error is up to
            the type that refuses it; none of them is more than an Exception.
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
    if tag in _LIBRARY:
        arguments = tuple(decode_value(item, depth + 1) for item in items)
        if tuple(map(type, arguments)) != _LIBRARY[tag][1]:
            raise ValueError("no encoded value")
        return _make_library_value(tag, arguments)
    match data:
        case ["int", str(text)]:
            return int(text, 16)
        case ["complex", float(real), float(imaginary)]:
            return complex(real, imaginary)
        case ["bytes", str(text)]:
            return bytes.fromhex(text)
        case ["bytearray", str(text)]:
            return bytearray.fromhex(text)
        case ["range", start, stop, step]:
            return range(*(decode_value(item, depth + 1) for item in (start, stop, step)))
        case ["opaque", None | bool() as truth]:
            return Opaque(truth)
    raise ValueError("no encoded value")


def _make_library_value(name: str, arguments: tuple) -> object:
    module, _, take_apart = _LIBRARY[name]
    kind = getattr(__import__(module), name)  # importlib would be one more import
    return kind.fromisoformat(*arguments) if take_apart is _write_iso else kind(*arguments)
