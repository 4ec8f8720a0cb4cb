"""Plain data that must cross the box unchanged."""

import collections

VALUES = [
    None, True, False, 0, -1, 2**63, -(10**400), 0.1, -0.0, float("inf"), 1j,
    "", "\ud800 é\0", b"\0\xff", [], [[1], (2,)],
    (), (1,), {1, "a"}, frozenset({(1, 2)}), {}, {"a": {1: [None]}, (1,): 2.5, None: True}, range(3, 10, 2),
    collections.Counter("aab"), collections.OrderedDict(b=1, a=2), collections.deque([1, 2]),
]  # fmt: skip
