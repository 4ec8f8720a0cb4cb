"""The codec between box and judge keeps plain data exactly, and refuses everything else.

Needs nothing. A second.
"""

import collections
import json
import re
from enum import IntEnum
from typing import Any

import pytest

from eval.sandbox.runner import decode_value, encode_value
from tests.support.sandbox_values import VALUES


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_codec_keeps_plain_data(value: object) -> None:
    back = decode_value(json.loads(json.dumps(encode_value(value, strict=True))))
    assert back == value and type(back) is type(value) and repr(back) == repr(value)


def test_codec_converts_what_is_nearly_plain() -> None:
    def through(value: object) -> Any:
        return decode_value(json.loads(json.dumps(encode_value(value))))

    assert through(collections.defaultdict(list, a=[1])) == {"a": [1]}
    assert list(through(x for x in "ab")) == list(through(map(str.lower, "AB"))) == ["a", "b"]
    assert next(through(iter([7]))) == 7
    assert through({"a": 1}.keys()) == {"a"} and list(through({"a": 1}.values())) == [1]
    assert through({"a": 1}.items()) == {("a", 1)}
    assert through(collections.namedtuple("P", "a b")(1, 2)) == (1, 2)
    assert str(through(float("nan"))) == "nan"
    for other in (
        object(),
        re.match("a", "a"),
        int,
        len,
        IntEnum("E", "A").A,
        type("S", (str,), {})("a"),
    ):
        back = through(other)
        assert back is not None and all(back != x for x in (other, back, 0, 1, "a"))
        with pytest.raises(TypeError):
            encode_value(other, strict=True)


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        {"a": 1},
        [1],
        ["code", 1],
        ["int"],
        ["int", 5],
        ["dict", 1],
        ["dict", [1]],
        ["set", ["list"]],
        [["list"]],
    ],
)
def test_codec_refuses_all_else(data: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        decode_value(data)
