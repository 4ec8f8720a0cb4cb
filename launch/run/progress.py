"""Progress of long work: a bar on a terminal, a few plain lines in a log."""

import sys
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

from launch.runtime import watchdog


def show_progress(items: Iterable, total: int, description: str, rank: int) -> Iterator:
    """Yield `items` with a progress bar on rank 0, or ten plain lines where it has no terminal.

    Every item counts as progress for the watchdog.
    """
    every = max(1, total // 10)
    terminal = sys.stderr.isatty()
    bar = tqdm(items, total=total, desc=description, disable=rank != 0 or not terminal)
    for done, item in enumerate(bar, start=1):
        watchdog.heartbeat(f"{description} {done}/{total}")
        yield item
        if rank == 0 and not terminal and (done % every == 0 or done == total):
            print(f"{description}: {done}/{total}", flush=True)


def show_progress_of_parts(
    parts: Iterable[dict],
    done: int,
    total: int,
    description: str,
    rank: int,
    describe: Callable[[], str],
) -> Iterator[dict]:
    """Yield `parts`, each of several items, with progress as in `show_progress`.

    Args:
        done: items of earlier starts.
        total: items of all parts and of earlier starts.
        describe: returns the text beside the bar.
    """
    terminal = sys.stderr.isatty()
    shown = 10 * done // max(1, total)  # tenths that have been printed
    with tqdm(
        total=total, initial=done, desc=description, disable=rank != 0 or not terminal
    ) as bar:
        for part in parts:
            yield part
            done += len(part)
            watchdog.heartbeat(f"{description} {done}/{total}")
            bar.update(len(part))
            bar.set_postfix_str(describe())
            if rank == 0 and not terminal and 10 * done // total > shown:
                shown = 10 * done // total
                print(f"{description}: {done}/{total} {describe()}".rstrip(), flush=True)
