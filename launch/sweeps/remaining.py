"""Say before a sweep starts how much of it is left: runs x minutes."""

import statistics
from collections.abc import Sequence

from launch.run.results import find_run_results
from launch.sweeps.rates import HIGHEST_STEP, LOWEST_STEP, make_rate
from launch.sweeps.table import Cell, Sweep


def describe_remaining(
    sweep: Sweep, cells: Sequence[Cell], num_missing: int, num_slots: int
) -> list[str]:
    """Describe the work that is left, in lines: kept runs, runs x minutes, what is still open.

    Args:
        num_missing: jobs that are known and not done.
        num_slots: jobs that run side by side.
    """
    folders = [sweep.find_folder(run) for run in sweep.list_all_runs(cells)]
    results = [found for found in map(find_run_results, folders) if found is not None]
    num_kept = sum(folder.parent == sweep.kept for folder in folders)
    lines = [f"{num_kept} of them are kept in {sweep.kept}"] if num_kept else []
    if num_missing and results:
        minutes = statistics.median(found.seconds.whole for found in results) / 60
        total = format_minutes(num_missing * minutes / num_slots)
        lines.append(
            f"{num_missing} runs x {minutes:.1f} min (median of {len(results)} finished), "
            f"{num_slots} at a time: {total}"
        )
    elif num_missing:
        lines.append(f"{num_missing} runs x unknown minutes: none has finished yet")
    rates = sweep.table.learning_rates
    if num_missing and rates and rates.extend:
        lines.append(
            "open: while the best rate of a row is at an end of its grid, one rate is added there, "
            f"down to {make_rate(LOWEST_STEP):g} and up to {make_rate(HIGHEST_STEP):g}; each is "
            "one more run"
        )
    return lines


def format_minutes(minutes: float) -> str:
    """Return a duration as people say it: `45 min`, `3.5 h`."""
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
