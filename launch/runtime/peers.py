"""What ranks report to one another, and what follows from the reports; no threads, no network."""

import time
from dataclasses import dataclass
from typing import NamedTuple

WAITS = ", waits for other ranks"  # ends the location of a rank that is inside a collective
NAMED_RANKS = 4  # at most so many ranks are described in a line


@dataclass(frozen=True)
class Limits:
    """Time limits of a watchdog, in seconds."""

    beat: float = 1.0  # between two reports of a rank
    silence: float = 60.0  # without a report: the rank's machine or network is taken to be gone
    # The same once a collective has failed, or a launcher stops the ranks because one is gone.
    short_silence: float = 6.0
    # Between two beats of a thread: the process itself stood still meanwhile, suspended.
    pause: float = 5.0
    # Without progress in phases without a stall limit, or 10 times --stall where that is more.
    untimed: float = 7200.0


@dataclass(frozen=True)
class Report:
    """What one rank tells of itself at each beat."""

    tick: int  # counts the reports
    phase: str  # such as "calibration" or "training step 5"
    location: str  # the line of this repository that the main thread is at; see `WAITS`
    host: str
    pid: int
    timed: bool  # whether the phase has a stall limit
    in_steps: bool  # whether the main thread looks at requests to stop itself
    heartbeats: int  # counts progress
    phase_heartbeats: int  # the same, since the phase began
    stop_reason: str | None  # why the rank was asked to stop
    failed: bool  # a collective of the rank has failed
    error: str | None = None  # why the rank must stop, as a line
    error_code: int = 1  # the exit code that belongs to it


class Verdict(NamedTuple):
    """How all processes are to end."""

    code: int  # 0: as asked; 1: a fault that a new start may not meet; 2: the user must mend it
    line: str


class PeerReports:
    """The newest report of each rank, and since when it has not changed.

    The methods that judge the reports return a verdict, or None where the run is to continue.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.began = time.monotonic()
        self.reports: dict[int, Report] = {}
        self.heard: dict[int, float] = {}  # rank -> when its tick last advanced
        self.heartbeats = -1  # of all ranks together
        self.progressed = time.monotonic()  # when they last advanced
        self.asked_since: float | None = None  # since when a rank is asked to stop
        self.erred_since: float | None = None  # since when a rank has an error

    def update(self, reports: dict[int, Report]) -> None:
        """Add the newest reports of some ranks."""
        now = time.monotonic()
        for rank, report in reports.items():
            known = self.reports.get(rank)
            if known is None or known.tick != report.tick:
                self.heard[rank] = now
        self.reports |= reports
        heartbeats = sum(report.heartbeats for report in self.reports.values())
        if heartbeats != self.heartbeats:
            self.heartbeats, self.progressed = heartbeats, now

    def skip_pause(self, seconds: float) -> None:
        """Subtract the last `seconds` from every wait.

        When this process was suspended (Slurm's SUSPEND, Ctrl-Z), the others were too and did not
        report.
        """
        self.began += seconds
        self.progressed += seconds
        self.heard = {rank: heard + seconds for rank, heard in self.heard.items()}
        self.asked_since = self.erred_since = None

    def judge(self, absent: list[int], stall: float, in_trouble: bool) -> Verdict | None:
        """Judge the reports of all ranks, on rank 0.

        Args:
            absent: ranks that have not reported yet.
            stall: seconds without progress, or for a rank to come, after which the run ends.
            in_trouble: whether this rank was asked to stop or a collective of it has failed.
        """
        return (
            self.find_error()
            or self.find_missing(absent, stall)
            or self.find_silent(in_trouble)
            or self.find_stalled(stall)
            or self.find_request_to_stop()
        )

    def find_error(self) -> Verdict | None:
        """End a run in which a rank has met an error.

        Where every rank meets it, rank 0's line stands for all; the others may be sooner. So one
        of theirs counts once rank 0 has had the time to meet it too.
        """
        failed = [rank for rank, report in self.reports.items() if report.error is not None]
        if not failed:
            return None
        now = time.monotonic()
        self.erred_since = self.erred_since or now
        if 0 not in failed and now - self.erred_since < 5 * self.limits.beat:
            return None
        report = self.reports[min(failed)]
        return Verdict(report.error_code, report.error)

    def find_missing(self, absent: list[int], limit: float) -> Verdict | None:
        """Give up ranks that have not come within `limit` seconds.

        Nothing else does: clients of torchrun's store do not wait for one another, and the process
        group waits for ever.
        """
        if absent and time.monotonic() - self.began > limit:
            return Verdict(1, f"{self.describe(absent)}: did not come within {limit:.0f} s")
        return None

    def find_silent(self, in_trouble: bool) -> Verdict | None:
        """Give up ranks that report no more; sooner if this rank or another one is in trouble."""
        others_in_trouble = any(r.failed or r.stop_reason for r in self.reports.values())
        in_trouble = in_trouble or others_in_trouble
        limit = self.limits.short_silence if in_trouble else self.limits.silence
        now = time.monotonic()
        gone = [rank for rank, heard in self.heard.items() if now - heard > limit]
        if gone:
            return Verdict(1, f"{self.describe(gone)}: gone; not heard of for {limit:.0f} s")
        return None

    def find_stalled(self, limit: float) -> Verdict | None:
        """End a run in which no rank has made progress for `limit` seconds.

        The limit is longer while a rank is in a phase without a stall limit.
        """
        now = time.monotonic()
        waited = now - self.progressed
        if not all(report.timed for report in self.reports.values()):
            limit = max(10 * limit, self.limits.untimed)
        if waited < limit:
            return None
        # The rank that the others wait for does not report, or is not inside a collective. On GPUs
        # healthy ranks also wait outside of collectives, for their device: in `.item()` for
        # example. The one that they wait for is then among those that have come least far.
        frozen = [rank for rank, heard in self.heard.items() if now - heard > 4 * self.limits.beat]
        busy = [
            rank
            for rank, report in self.reports.items()
            if not report.location.endswith(f"{WAITS})")
        ]
        ranks = frozen or self._find_hindmost(busy or list(self.reports))
        return Verdict(1, f"{self.describe(ranks)}: stalled; no progress for {waited:.0f} s")

    def _find_hindmost(self, ranks: list[int]) -> list[int]:
        """Return those of `ranks` with the fewest heartbeats since their phase began.

        In a phase ranks count alike. Before it they need not: rank 0 alone writes files, for
        example.
        """
        fewest = min(self.reports[rank].phase_heartbeats for rank in ranks)
        return [rank for rank in ranks if self.reports[rank].phase_heartbeats == fewest]

    def find_request_to_stop(self) -> Verdict | None:
        """End a run that was asked to stop, in a phase without steps."""
        reasons = [r.stop_reason for r in self.reports.values() if r.stop_reason]
        if not reasons or self.reports[0].in_steps:
            self.asked_since = None
            return None
        # A launcher also sends signals when a rank has died. That rank no longer reports, and
        # `find_silent` will name it.
        now, beat = time.monotonic(), self.limits.beat
        self.asked_since = self.asked_since or now
        some_are_silent = any(now - heard > 3 * beat for heard in self.heard.values())
        if now - self.asked_since < 4 * beat or some_are_silent:
            return None
        return Verdict(0, f"stopped in {self.reports[0].phase}: {reasons[0]}")

    def describe(self, ranks: list[int]) -> str:
        """Return who `ranks` are and what they did last, the first few of them."""
        text = "; ".join(self._describe_rank(rank) for rank in ranks[:NAMED_RANKS])
        more = len(ranks) - NAMED_RANKS
        return f"{text} and {more} more ranks" if more > 0 else text

    def _describe_rank(self, rank: int) -> str:
        if rank not in self.reports:
            return f"rank {rank}"
        report = self.reports[rank]
        place = f"{report.phase}, {report.location}"
        return f"rank {rank} ({report.host}, pid {report.pid}) at {place}"
