"""The codec between box and judge keeps plain data, and what it cannot keep equals nothing.

Proves that values arrive as types that compare as plain Python compares them, that a class with a
comparison of its own forges none, and that no message ends the judge or makes a pass by itself.
Needs nothing. A few seconds; half a minute with the `full` one.
"""

import array
import collections
import contextlib
import datetime
import enum
import json
import os
import re
import types
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.sandbox import codec
from eval.sandbox.codec import Opaque, decode_value, encode_value
from eval.sandbox.judge import BROKEN, Channel, Fault, Stop, judge_solution
from eval.sandbox.runner import write_message
from tests.support.sandbox_values import VALUES


def pass_through(value: object, strict: bool = False) -> object:
    return decode_value(json.loads(json.dumps(encode_value(value, strict))))


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_plain_data_keeps_value_and_type(value: object) -> None:
    back = pass_through(value, strict=True)
    assert back == value and type(back) is type(value) and repr(back) == repr(value)


class Text(str):
    """A subclass without a comparison of its own, as honest programs return."""


class Truncated(float):
    """A subclass whose comparison is plain for its own value."""

    def __eq__(self, other: object) -> bool:
        return int(self) == other

    __hash__ = float.__hash__


Point = collections.namedtuple("Point", "x y")
Number = enum.IntEnum("Number", "ONE TWO")
Flags = enum.IntFlag("Flags", "A B")


def make_subclass(kind: type, *arguments: object) -> object:
    return type("Sub", (kind,), {})(*arguments)


EQUAL = [
    (collections.defaultdict(list, a=[1]), {"a": [1]}),
    (Point(1, 2), (1, 2)),
    ([Point(1, 2), {Point(3, 4): Text("a")}], [(1, 2), {(3, 4): "a"}]),
    (Text("a"), "a"),
    (Number.TWO, 2),
    (Flags.A | Flags.B, 3),
    (enum.Enum("Word", {"A": "a"}, type=str).A, "a"),
    (make_subclass(int, 2**70), 2**70),
    (make_subclass(float, 0.5), 0.5),
    (make_subclass(complex, 1j), 1j),
    (make_subclass(bytes, b"a"), b"a"),
    (make_subclass(list, [1]), [1]),
    (make_subclass(tuple, [1]), (1,)),
    (make_subclass(set, [1]), {1}),
    (make_subclass(frozenset, [1]), {1}),
    (make_subclass(dict, {1: 2}), {1: 2}),
    (make_subclass(collections.deque, [1]), collections.deque([1])),
    (make_subclass(collections.Counter, "aab"), {"a": 2, "b": 1}),
    (make_subclass(collections.OrderedDict, {1: 2}), {1: 2}),
    (make_subclass(Fraction, 1, 2), 0.5),
    (make_subclass(Decimal, "0.5"), 0.5),
    (make_subclass(datetime.date, 2020, 1, 2), datetime.date(2020, 1, 2)),
    (collections.UserList([1]), [1]),
    (collections.UserDict({1: 2}), {1: 2}),
    (collections.UserString("a"), "a"),
    (collections.ChainMap({1: 2}, {3: 4}), {1: 2, 3: 4}),
    (types.MappingProxyType({1: 2}), {1: 2}),
    (memoryview(b"ab"), b"ab"),
    ({"a": 1}.keys(), {"a"}),
    ({"a": 1}.items(), {("a", 1)}),
    (collections.OrderedDict(a=1).keys(), {"a"}),
    (collections.UserDict(a=1).items(), {("a", 1)}),
]


@pytest.mark.parametrize(("value", "plain"), EQUAL, ids=lambda value: type(value).__name__)
def test_what_plain_python_holds_equal_arrives_equal(value: object, plain: object) -> None:
    assert value == plain
    back = pass_through(value)
    assert back == plain and plain == back and bool(back) == bool(value)
    assert (back != plain) is False


@pytest.mark.parametrize(
    "value",
    [
        Fraction(1, 3),
        Decimal("0.10"),
        Decimal("-0"),
        Decimal("1e999999999"),
        array.array("d", [0.5]),
        datetime.timedelta(1, 2, 3),
        datetime.date(2020, 1, 2),
        datetime.time(1, 2, 3, 4),
        datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.timezone(datetime.timedelta(hours=5))),
        bytearray(b"a"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_types_of_the_standard_library_stay_what_they_are(value: object) -> None:
    back = pass_through([value], strict=True)[0]
    assert back == value and type(back) is type(value) and repr(back) == repr(value)


def test_order_and_laziness() -> None:
    ordered = collections.OrderedDict(a=1, b=2)
    ordered.move_to_end("a")
    assert list(pass_through(ordered)) == ["b", "a"]
    assert list(pass_through(x for x in "ab")) == list(pass_through(map(str.lower, "AB")))
    assert next(pass_through(iter([7]))) == 7
    assert list(pass_through({"a": 1}.values())) == [1]
    assert str(pass_through(float("nan"))) == "nan"


class Equal:
    """Claims to be whatever it is compared with."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return 0

    __class__ = int


def make_liar(kind: type, *arguments: object) -> object:
    return type("Liar", (Equal, kind), {"__class__": kind})(*arguments)


LIARS = [
    Equal(),
    make_liar(int, 3),
    make_liar(str, "3"),
    make_liar(float, 3.5),
    make_liar(list, [3]),
    make_liar(tuple, [3]),
    make_liar(dict, {3: 3}),
    make_liar(set, [3]),
    make_liar(Fraction, 3),
    make_liar(Decimal, 3),
    make_liar(datetime.date, 3, 3, 3),
    make_liar(collections.UserList, [3]),
    make_liar(collections.UserDict, {3: 3}),
    type("Fraction", (Equal,), {"__module__": "fractions", "numerator": 4, "denominator": 1})(),
]


@pytest.mark.parametrize("liar", LIARS, ids=lambda value: type(value).__mro__[-2].__name__)
def test_a_comparison_of_its_own_forges_nothing(liar: object) -> None:
    for wanted in (4, "4", 4.5, [4], (4,), {4: 4}, {4}, None, Fraction(4), Decimal(4)):
        assert liar == wanted
        for back in (pass_through(liar), pass_through([liar])[0]):
            assert back != wanted and wanted != back
            assert (back == wanted) is False
        with contextlib.suppress(TypeError):  # a list is refused as a key, although this one hashes
            back = pass_through({liar: 1})
            assert not [key for key in back if key == wanted]


def test_a_comparison_that_never_holds_is_not_mended() -> None:
    never = type("Never", (int,), {"__eq__": lambda *_: False, "__hash__": int.__hash__})(4)
    assert (never == 4) is False
    assert (pass_through(never) == 4) is False


def test_a_class_may_compare_its_own_value_as_plain_python_would() -> None:
    assert pass_through(Truncated(4.0)) == 4.0
    assert pass_through(Truncated(4.5)) != 4.5  # equals no float, so it crosses as no float


@pytest.mark.parametrize("value", [object(), re.match("a", "a"), int, len, lambda: 1])
def test_other_objects_equal_nothing(value: object) -> None:
    back = pass_through(value)
    assert type(back) is Opaque and back is not None and bool(back) is True
    assert all(back != other for other in (value, back, 0, 1, "a", None))
    with pytest.raises(TypeError):
        encode_value(value, strict=True)


def test_opaque_objects_keep_their_truth() -> None:
    def fail(_: object) -> bool:
        raise ValueError

    assert not pass_through(type("Empty", (), {"__len__": lambda _: 0})())
    with pytest.raises(TypeError):
        bool(pass_through(type("Neither", (), {"__bool__": fail})()))


@pytest.mark.parametrize(
    "data",
    [
        *([], {}, {"a": 1}, [1], ["code", 1], ["int"], ["int", 5], ["dict", 1], ["dict", [1]]),
        *(["set", ["list"]], [["list"]], ["Fraction", 1, 0], ["Fraction", "1/3"], ["Decimal", "x"]),
        ["Fraction", ["Decimal", "1e999999999"], 1],
        *(["array", "z", ["list"]], ["array", "b", ["list", 999]], ["date", "x"], ["timedelta", 1]),
        *(["opaque"], ["opaque", 1], ["bytearray", "x"], ["importlib"], ["Fraction", True, 1]),
    ],
)
def test_everything_else_is_refused(data: object) -> None:
    with pytest.raises(BROKEN):
        decode_value(data)


# What messages are made of: the codec's own words, so that most are nearly right.
TAGS = [*codec._MAKE_SEQUENCE, *codec._MAKE_MAPPING, *codec._LIBRARY]
WORDS = ["int", "complex", "bytes", "bytearray", "range", "opaque", "0x4", "ff", "4", *TAGS]
LEAVES = st.one_of(
    *(st.none(), st.booleans(), st.integers(-(2**80), 2**80), st.floats(), st.text(max_size=4)),
    st.sampled_from(WORDS),
)
DATA = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.builds(
            lambda tag, items: [tag, *items], st.sampled_from(WORDS), st.lists(inner, max_size=4)
        ),
        st.dictionaries(st.text(max_size=3), inner, max_size=2),
    ),
    max_leaves=12,
)
MESSAGES = st.one_of(
    DATA,
    st.builds(lambda data: ["value", data], DATA),
    st.tuples(
        st.just("raised"), st.sampled_from(["ValueError", "KeyError", "x", "exit"]), LEAVES
    ).map(list),
    st.sampled_from(
        [["ready"], ["started"], ["passed", ""], ["failed", "why"], ["value"], ["tests"]]
    ),
)
SECRET = 918_273_645.5  # no message equals it
KINDS = {
    *(type(None), bool, int, float, complex, str, bytes, bytearray, range, Opaque),
    *codec._SEQUENCE_TAGS,
    *codec._MAPPING_TAGS,
    *(Fraction, Decimal, array.array, datetime.timedelta, datetime.date, datetime.time),
    *(datetime.datetime, type(iter([])), type({}.keys()), type({}.values()), type({}.items())),
}


def check_data(data: object) -> None:
    """Check that data either become a value of a known type, or are refused."""
    try:
        value = decode_value(data)
    except BROKEN:
        return
    assert type(value) in KINDS


def judge_messages(messages: list[bytes], tests: str, in_box: bool = False) -> str | None:
    """Return the judge's verdict on a box that sends these bytes, whatever it is asked."""
    source, box = os.pipe()
    heard, sink = os.pipe()
    try:
        for message in (["started"], ["ready"]):
            write_message(box, message)
        os.write(box, b"".join(messages))
        os.close(box)
        job = {"solution": "", "entry_point": "f", "setup": "", "tests": tests}
        job["in_box"] = in_box
        return judge_solution(Channel(source, sink), job)
    except (Stop, Fault) as end:
        return str(end)
    finally:
        for fd in (source, heard, sink):
            os.close(fd)


def frame(message: object) -> bytes:
    data = json.dumps(message).encode()
    return len(data).to_bytes(4, "big") + data


def check_judge(messages: list[object], garbage: bytes) -> None:
    """Check that no messages pass a test whose value they do not hold."""
    sent = [frame(message) for message in messages]
    for tests in (
        f"assert f(1) == {SECRET}",
        f"assert {SECRET} == f(1)",
        f"assert f(1) == [{SECRET}]",
        f"assert {SECRET} in [f(1), f(2)]",
        f"try: f(1)\nexcept BaseException: pass\nassert f(2) == {SECRET}",
    ):
        assert judge_messages(sent, tests) is not None
        assert judge_messages([garbage, *sent], tests) is not None
    assert judge_messages(sent, "assert f(1) == 4", in_box=True) is not None


FUZZ: dict[str, tuple[Callable, list]] = {
    "data": (check_data, [DATA]),
    "judge": (check_judge, [st.lists(MESSAGES, max_size=4), st.binary(max_size=20)]),
}


@pytest.mark.parametrize("name", FUZZ)
def test_no_message_ends_the_judge_or_makes_a_pass(name: str) -> None:
    check, strategies = FUZZ[name]
    settings(max_examples=150, deadline=None, derandomize=True)(given(*strategies)(check))()


# The same with thousands of messages.
@pytest.mark.full
@pytest.mark.parametrize("name", FUZZ)
def test_no_message_of_thousands(name: str) -> None:
    check, strategies = FUZZ[name]
    settings(max_examples=5000, deadline=None, derandomize=True)(given(*strategies)(check))()
