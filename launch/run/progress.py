"""Progress of long work: one live line a stage on a terminal, a few plain lines in a log.

Rank 0 alone shows anything. A live line has what is done, the rate and the time left. In a log there
is a line at every tenth and at least every minute, but never two within SHORT seconds; and one at
the end, of a stage that was not as short as that or has something to say, such as an accuracy.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from types import TracebackType

from tqdm import tqdm

from launch.runtime import watchdog

SHORT = 2.0  # seconds
LONG = 60.0  # seconds after which a log has a line, however little was done
LIVE_LINE = "{desc}: {n_fmt}/{total_fmt} {bar:10} {rate_fmt}, {remaining} left{postfix}"


def has_terminal() -> bool:
    """Return whether a live line can be shown. A terminal without a size, as of a pod, shows none."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


class Progress:
    """The progress of one stage.

    Every item that is done is told by `advance`. Used in a `with` statement: at its end without an
    error the stage is over.
    """

    def __init__(
        self, name: str, total: int | None, rank: int, unit: str = "items", done: int = 0
    ) -> None:
        """Begin a stage.

        Args:
            name: of the stage, which the line begins with.
            total: items of the whole stage; None where that is not known.
            rank: of this process.
            unit: what the items are, in the plural.
            done: items of earlier starts.
        """
        self.name, self.total, self.unit = name, total, unit
        self.before = self.done = done
        self.text = ""
        is_terminal = has_terminal()
        self.is_logged = rank == 0 and not is_terminal
        self.started = self.printed_at = time.monotonic()
        self.shown_tenths = self._count_tenths()
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=name,
            unit=f" {unit}",
            bar_format=LIVE_LINE if total else None,
            dynamic_ncols=True,  # a line that is too long is cut, not wrapped
            disable=rank != 0 or not is_terminal,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.bar.close()
        is_told = self.text or time.monotonic() - self.started >= SHORT
        if self.is_logged and kind is None and self.done > self.before and is_told:
            self._print_end()

    def advance(self, count: int = 1, text: str = "") -> None:
        """Tell that `count` further items are done.

        Args:
            text: shown beside the numbers, such as the loss.
        """
        self.done += count
        self.text = text
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(count)
        if self.is_logged and self._is_due():
            self._print_line()

    def _is_due(self) -> bool:
        """Return whether a log is to have a line now."""
        since = time.monotonic() - self.printed_at
        if self.done == self.total or since < SHORT:  # the end has a line of its own
            return False
        return since >= LONG or self._count_tenths() > self.shown_tenths

    def _count_tenths(self) -> int:
        return 10 * self.done // self.total if self.total else 0

    def _print_line(self) -> None:
        self.printed_at = time.monotonic()
        self.shown_tenths = self._count_tenths()
        rate = (self.done - self.before) / (self.printed_at - self.started)
        line = f"{self.name}: {self._describe_done()}, {self._describe_rate(rate)}"
        if self.total:
            line += f", {_format_seconds((self.total - self.done) / rate)} left"
        _print(line, self.text)

    def _print_end(self) -> None:
        seconds = time.monotonic() - self.started
        _print(f"{self.name}: {self._describe_done()} in {_format_seconds(seconds)}", self.text)

    def _describe_done(self) -> str:
        return f"{self.done}/{self.total}" if self.total else f"{self.done} {self.unit}"

    def _describe_rate(self, rate: float) -> str:
        return f"{rate:.3g} {self.unit}/s" if rate >= 1 else f"{1 / rate:.3g} s each"


def _format_seconds(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _print(line: str, text: str) -> None:
    print(f"{line}, {text}" if text else line, flush=True)


def show_progress(
    items: Iterable, total: int, name: str, rank: int, unit: str = "items"
) -> Iterator:
    """Yield `items` while their progress is shown. Every item is one for the watchdog too."""
    with Progress(name, total, rank, unit) as progress:
        for done, item in enumerate(items, start=1):
            watchdog.heartbeat(f"{name} {done}/{total}")
            yield item
            progress.advance()


def show_progress_of_parts(
    parts: Iterable[dict],
    done: int,
    total: int,
    name: str,
    rank: int,
    describe: Callable[[], str],
    unit: str,
) -> Iterator[dict]:
    """Yield `parts`, each of several items, with progress as in `show_progress`.

    Args:
        done: items of earlier starts.
        total: items of all parts and of earlier starts.
        describe: returns the text beside the numbers.
    """
    with Progress(name, total, rank, unit, done) as progress:
        for part in parts:
            yield part
            done += len(part)
            watchdog.heartbeat(f"{name} {done}/{total}")
            progress.advance(len(part), describe())
