"""Fixtures of the sandbox's tests."""

import time
from collections.abc import Iterator

import pytest

from eval.sandbox.box import LEVELS, Box
from tests.support.sandbox import BOXES, find_boxed_processes, find_zombies


@pytest.fixture(params=LEVELS)
def box(request: pytest.FixtureRequest) -> Box:
    """Each kind of box; those that this machine lacks are skipped."""
    if request.param not in BOXES:
        pytest.skip(f"{request.param} does not work on this machine")
    return BOXES[request.param]


@pytest.fixture
def any_box() -> None:
    """Skip the test where no box works."""
    if not BOXES:
        pytest.skip("neither bubblewrap nor user namespaces work on this machine")


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Check after the test that it left no process in a box and no zombie.

    Those that were there before do not count: another process may run tests at the same time.
    """
    before, dead = find_boxed_processes(), find_zombies()
    yield
    left = find_boxed_processes() - before
    until = time.monotonic() + 3
    while left & find_boxed_processes() and time.monotonic() < until:
        time.sleep(0.01)
    assert left & find_boxed_processes() == set()
    assert find_zombies() - dead == set()
