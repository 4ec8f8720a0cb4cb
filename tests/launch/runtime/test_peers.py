"""What rank 0 concludes from the ranks' reports, on a clock that the tests set.

Needs nothing. Takes less than a second.
"""

from dataclasses import replace

import pytest

from launch.runtime import peers
from launch.runtime.peers import WAITS, Limits, PeerReports, Report, Verdict

LIMITS = Limits()
AT = "(launch/training/loop.py:1)"
WAITING = f"(launch/training/loop.py:1{WAITS})"
REPORT = Report(
    tick=1,
    phase="training step 5",
    location=AT,
    host="h",
    pid=7,
    timed=True,
    in_steps=True,
    heartbeats=1,
    phase_heartbeats=1,
    stop_reason=None,
    failed=False,
)


class Clock:
    """The time that PeerReports sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(peers.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def report(tick: int, **changes: object) -> Report:
    """Return the usual report with another tick and `changes`."""
    return replace(REPORT, tick=tick, **changes)


def test_a_rank_is_silent_after_its_last_tick_only(clock: Clock) -> None:
    seen = PeerReports(LIMITS)
    seen.update({0: report(1), 1: report(1)})
    clock.now += LIMITS.silence
    seen.update({0: report(2), 1: report(1)})
    assert seen.find_silent(in_trouble=False) is None
    clock.now += 1
    code, line = seen.find_silent(in_trouble=False)
    assert code == 1
    assert line.startswith(f"rank 1 (h, pid 7) at training step 5, {AT}: gone; not heard of for 60")


@pytest.mark.parametrize("trouble", [{"failed": True}, {"stop_reason": "SIGTERM"}, None])
def test_a_failed_collective_or_a_signal_shortens_the_wait(
    clock: Clock, trouble: dict | None
) -> None:
    seen = PeerReports(LIMITS)
    seen.update({0: report(1), 1: report(1)})
    clock.now += LIMITS.short_silence + 1
    seen.update({0: report(2, **(trouble or {})), 1: report(1)})
    assert "rank 1" in seen.find_silent(in_trouble=trouble is None).line


def test_the_rank_that_does_not_wait_is_the_stalled_one(clock: Clock) -> None:
    seen = PeerReports(LIMITS)
    for tick in range(12):
        waiting = report(tick, location=WAITING)
        seen.update({0: waiting, 1: report(tick), 2: waiting})
        clock.now += 1
    assert seen.find_stalled(20) is None
    line = seen.find_stalled(10).line
    assert line.startswith("rank 1 (")
    assert "rank 0" not in line and "rank 2" not in line


def test_where_all_ranks_seem_busy_the_one_with_the_fewest_heartbeats_is_named(
    clock: Clock,
) -> None:
    """On GPUs a healthy rank waits in `.item()`, which does not look like waiting."""
    seen = PeerReports(LIMITS)
    for tick in range(12):
        ahead, behind = report(tick, phase_heartbeats=8), report(tick, phase_heartbeats=7)
        # Rank 0 has heartbeats of earlier phases that the others have not: they do not count.
        seen.update({0: replace(ahead, heartbeats=50), 1: ahead, 2: behind, 3: ahead})
        clock.now += 1
    line = seen.find_stalled(10).line
    assert line.startswith("rank 2 (") and "and" not in line
    assert not any(f"rank {other}" in line for other in (0, 1, 3))


def test_ranks_that_never_came_are_given_up(clock: Clock) -> None:
    seen = PeerReports(LIMITS)
    seen.update({0: report(1), 2: report(1)})
    clock.now += 5
    assert seen.find_missing([1, 3], 5) is None
    clock.now += 1
    verdict = Verdict(1, "rank 1; rank 3: did not come within 5 s")
    assert seen.find_missing([1, 3], 5) == verdict
    assert seen.judge([1, 3], 5, in_trouble=False) == verdict
    assert seen.find_missing([], 5) is None


def test_the_first_of_many_ranks_are_named(clock: Clock) -> None:
    seen = PeerReports(LIMITS)
    clock.now += 6
    line = "rank 1; rank 2; rank 3; rank 4 and 3 more ranks: did not come within 5 s"
    assert seen.find_missing(list(range(1, 8)), 5).line == line


def test_progress_of_any_rank_is_no_stall(clock: Clock) -> None:
    seen = PeerReports(LIMITS)
    for tick in range(20):
        seen.update({0: report(tick), 1: report(tick, heartbeats=tick)})
        clock.now += 1
    assert seen.find_stalled(10) is None


@pytest.mark.parametrize(("untimed", "stall", "limit"), [(60, 5, 60), (60, 10, 100)])
def test_a_phase_without_stall_limit_has_longer(
    untimed: float, stall: float, limit: float, clock: Clock
) -> None:
    seen = PeerReports(replace(LIMITS, untimed=untimed))
    began = clock.now
    while clock.now < began + limit:
        tick = int(clock.now)
        seen.update({0: report(tick, timed=False), 1: report(tick, location=WAITING)})
        assert seen.find_stalled(stall) is None
        clock.now += 1
    assert seen.find_stalled(stall).line.startswith("rank 0 (h, pid 7) at training step 5")


def test_a_request_to_stop_waits_until_no_rank_is_missing(clock: Clock) -> None:
    seen = PeerReports(LIMITS)
    phase = {"in_steps": False, "phase": "calibration"}
    for tick in range(5):
        seen.update({0: report(tick, stop_reason="SIGTERM", **phase), 1: report(0, **phase)})
        # Rank 1 may be what the launcher stops the others for.
        assert seen.find_request_to_stop() is None
        clock.now += 1
    for tick in range(5, 9):
        seen.update({0: report(tick, stop_reason="SIGTERM", **phase), 1: report(tick, **phase)})
        clock.now += 1
    assert seen.find_request_to_stop() == Verdict(0, "stopped in calibration: SIGTERM")


def test_in_training_steps_the_loop_stops_itself(clock: Clock) -> None:
    seen = PeerReports(LIMITS)
    for tick in range(9):
        seen.update({0: report(tick, stop_reason="SIGTERM"), 1: report(tick)})
        assert seen.find_request_to_stop() is None
        clock.now += 1


def test_a_pause_of_this_process_counts_for_no_wait(clock: Clock) -> None:
    seen = PeerReports(LIMITS)
    seen.update({0: report(1), 1: report(1)})
    clock.now += 10 * LIMITS.untimed
    seen.skip_pause(10 * LIMITS.untimed)
    assert seen.judge([2], 5, in_trouble=True) is None


def test_an_error_of_one_rank_ends_all_with_its_line_and_code(clock: Clock) -> None:
    seen = PeerReports(LIMITS)
    failed = report(1, error="rank 1 (node): out of memory", error_code=2)
    seen.update({0: report(1), 1: failed})
    assert seen.judge([], stall=600, in_trouble=False) is None  # rank 0 may be about to meet it
    clock.now += 5 * LIMITS.beat
    assert seen.judge([], stall=600, in_trouble=False) == (2, "rank 1 (node): out of memory")


def test_rank_0_speaks_for_all_where_it_meets_the_error_too(clock: Clock) -> None:
    seen = PeerReports(LIMITS)
    seen.update({0: report(1), 1: report(1, error="rank 1 (node): no field", error_code=2)})
    assert seen.find_error() is None
    seen.update({0: report(2, error="no field", error_code=2)})
    assert seen.find_error() == (2, "no field")
