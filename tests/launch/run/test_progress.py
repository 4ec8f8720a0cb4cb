"""Proves what progress shows: plain lines in a log, a live line on a terminal, only on rank 0.

Time is a number that the tests move, so nothing waits. 1 s.
"""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from launch.run import progress
from launch.run.progress import Progress, show_progress, show_progress_of_parts
from tests.support.paths import ROOT

STAGE = """
from launch.run.progress import Progress
with Progress("train", 4, 0, "steps") as stage:
    for number in range(4):
        stage.advance(text=f"loss {number}.5")
"""


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """Return the time in seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of launch.run.progress."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def read_lines(capsys: pytest.CaptureFixture) -> list[str]:
    """Return the lines that were printed; nothing goes to stderr."""
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def test_a_log_has_a_line_at_every_tenth_with_rate_and_time_left(
    clock: Clock, capsys: pytest.CaptureFixture
) -> None:
    with Progress("train", 100, 0, "steps") as stage:
        for _ in range(100):
            clock.now += 0.5
            stage.advance(text="loss 1")
    lines = read_lines(capsys)
    assert lines[0] == "train: 10/100, 2 steps/s, 0:00:45 left, loss 1"
    assert [line.split(",")[0] for line in lines[:-1]] == [
        f"train: {10 * i}/100" for i in range(1, 10)
    ]
    assert lines[-1] == "train: 100/100 in 0:00:50, loss 1"


def test_quick_steps_do_not_fill_a_log(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    with Progress("solve", 100, 0, "rounds") as stage:
        for _ in range(100):
            clock.now += 0.0625
            stage.advance()
    lines = read_lines(capsys)
    assert [line.split(",")[0] for line in lines] == [
        "solve: 32/100",
        "solve: 64/100",
        "solve: 96/100",
        "solve: 100/100 in 0:00:06",
    ]


def test_slow_items_have_a_line_a_minute(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    with Progress("train", 1000, 0, "steps") as stage:
        for _ in range(10):
            clock.now += 25
            stage.advance()
    lines = read_lines(capsys)
    assert lines[0] == "train: 3/1000, 25 s each, 6:55:25 left"
    assert [line.split(",")[0] for line in lines[:3]] == [
        "train: 3/1000",
        "train: 6/1000",
        "train: 9/1000",
    ]
    assert lines[3] == "train: 10/1000 in 0:04:10"  # asked to stop: it did not get further


def test_a_short_stage_prints_nothing_but_what_it_has_to_say(
    clock: Clock, capsys: pytest.CaptureFixture
) -> None:
    assert list(show_progress(range(5), 5, "solve", 0)) == list(range(5))
    assert read_lines(capsys) == []
    parts = [{0: "a", 1: "b"}, {2: "c"}]
    shown = show_progress_of_parts(parts, 2, 5, "gsm8k", 0, lambda: "accuracy 50.0 %", "responses")
    assert list(shown) == parts
    assert read_lines(capsys) == ["gsm8k: 5/5 in 0:00:00, accuracy 50.0 %"]


def test_the_rate_is_that_of_this_start(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    with Progress("train", 100, 0, "steps", done=85) as stage:
        clock.now += 10
        stage.advance(10)
    first, last = read_lines(capsys)
    assert first == "train: 95/100, 1 steps/s, 0:00:05 left"
    assert last == "train: 95/100 in 0:00:10"
    with Progress("train", 100, 0, "steps", done=100):
        clock.now += 10
    assert read_lines(capsys) == []  # nothing was left to do


def test_an_unknown_total_is_counted_up(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    with Progress("tokenise", None, 0, "rows") as stage:
        for _ in range(3):
            clock.now += 40
            stage.advance(1000)
    lines = read_lines(capsys)
    assert lines == ["tokenise: 2000 rows, 25 rows/s", "tokenise: 3000 rows in 0:02:00"]


def test_other_ranks_and_failed_stages_print_nothing_more(
    clock: Clock, capsys: pytest.CaptureFixture
) -> None:
    with Progress("train", 10, 1, "steps") as stage:
        clock.now += 100
        stage.advance(text="loss 1")
    with pytest.raises(OSError, match="disk"), Progress("train", 10, 0, "steps") as stage:
        stage.advance(text="loss 1")
        raise OSError("disk")
    assert read_lines(capsys) == []


@pytest.mark.parametrize(("columns", "is_live"), [(80, True), (0, False)])
def test_a_terminal_has_one_live_line_that_fits(columns: int, is_live: bool) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(
        theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0)
    )
    done = subprocess.run(
        [sys.executable, "-c", STAGE], stdout=subprocess.PIPE, stderr=theirs, cwd=ROOT, text=True
    )
    os.close(theirs)
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        shown = terminal.read(1 << 16).decode() if is_live else ""
    assert done.returncode == 0
    if not is_live:  # as a pod's without a size
        assert done.stdout == "train: 4/4 in 0:00:00, loss 3.5\n"
        return
    assert done.stdout == ""
    assert shown.count("\n") == 1
    last = [line for line in re.split(r"[\r\n]", shown) if line.strip()][-1]
    assert last.startswith("train: 4/4 ") and "steps/s, 00:00 left, loss 3.5" in last
    assert max(map(len, re.split(r"[\r\n]", shown))) <= columns
