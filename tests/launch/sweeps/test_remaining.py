"""What is left of a sweep is told in runs, minutes and slots, from the runs that have finished.

Needs nothing; a second.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.sweeps.remaining import describe_remaining, format_minutes
from launch.sweeps.table import LearningRates
from tests.support.sweeps import make_results, make_sweep, write_results

NOT_RUN = {"a_1": [None] * 3, "b": [None] * 3, "c": [None] * 3}


def test_what_is_left_is_runs_times_the_median_minutes_over_the_slots(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, NOT_RUN)
    cells = sweep.list_cells()
    assert describe_remaining(sweep, cells, 9, 2) == [
        "9 runs x unknown minutes: none has finished yet"
    ]
    first, second = (sweep.list_eval_runs(cell)["recipe"] for cell in cells[:2])
    # 5, 7 and 100 minutes, calibration included; of the last the total is known.
    for run, seconds in zip(
        first,
        (
            {"calibration": 60.0, "training": 240.0},
            {"calibration": 0.0, "training": 420.0},
            {"calibration": 1.0, "training": 1.0, "total": 6000.0},
        ),
        strict=True,
    ):
        write_results(sweep, run, make_results(0.5, seconds=seconds))
    line = "6 runs x 7.0 min (median of 3 finished), {} at a time: {}"
    assert describe_remaining(sweep, cells, 6, 1) == [line.format(1, "42 min")]
    assert describe_remaining(sweep, cells, 6, 4) == [line.format(4, "10 min")]
    # Runs that are kept count too, and cells of which nothing is asked do not.
    sweep = replace(sweep, kept=tmp_path / "kept")
    seconds = {"calibration": 0.0, "training": 60.0}
    kept = replace(sweep, folder=sweep.kept)
    write_results(kept, second[0], make_results(0.5, seconds=seconds))
    assert describe_remaining(sweep, cells, 5, 1) == [
        f"1 of them are kept in {sweep.kept}",
        "5 runs x 6.0 min (median of 4 finished), 1 at a time: 30 min",
    ]
    assert describe_remaining(sweep, cells[1:2], 2, 1)[1:] == [
        "2 runs x 1.0 min (median of 1 finished), 1 at a time: 2 min"
    ]
    assert describe_remaining(sweep, cells[:1], 0, 1) == []


def test_rates_that_may_still_be_added_are_told(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, NOT_RUN)
    rates = LearningRates(grid=[1e-4], seed=0, extend=True)
    sweep = replace(sweep, table=sweep.table.model_copy(update={"learning_rates": rates}))
    cells = sweep.list_cells()
    assert describe_remaining(sweep, cells, 3, 1)[1:] == [
        "open: while the best rate of a row is at an end of its grid, one rate is added there, down to "
        "1e-06 and up to 0.0316; each is one more run"
    ]
    assert describe_remaining(sweep, cells, 0, 1) == []


@pytest.mark.parametrize(
    ("minutes", "text"),
    [(0.4, "0 min"), (45.0, "45 min"), (89.4, "89 min"), (90.0, "1.5 h"), (210.0, "3.5 h")],
)
def test_minutes_are_told_as_people_do(minutes: float, text: str) -> None:
    assert format_minutes(minutes) == text
