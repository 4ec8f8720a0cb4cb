"""Group a table's runs over seeds, with means and their 95 % intervals of Student's t."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from scipy import stats

from launch.config.schema import Recipe
from launch.run.results import Prediction, RunResults, TaskScore, find_run_results
from launch.sweeps.inputs import check_inputs
from launch.sweeps.table import Cell, Rate, Run, Sweep, has_diverged, list_benchmarks

PERCENT, CORRELATION = (0.0, 100.0), (-100.0, 100.0)
CORRELATIONS = ("matthews", "pearson", "spearman")  # metrics of tasks that may be below 0


class Point(NamedTuple):
    """A mean over seeds."""

    mean: float
    half: float | None  # of its 95 % interval; None for a single seed, which has none


class Column(NamedTuple):
    """A number of a run."""

    title: str
    value: Callable[[RunResults], float | None]  # None where the run has no such number
    form: str  # format specification
    better: Literal["high", "low"] | None = None  # None: neither is better
    has_median: bool = False  # whether the median over seeds is shown too, as GLUE's tables have it
    limits: tuple[float, float] | None = None  # the least and the greatest number there can be


@dataclass(frozen=True)
class Group:
    """The runs of one cell at one learning rate, over seeds."""

    label: str  # of the row
    value: Any  # None where nothing varies
    rate: Rate
    lr: float
    at_edge: bool  # its own learning rate is the least or the greatest of its grid
    num_wanted: int  # seeds
    num_diverged: int
    results: dict[int, RunResults]  # by seed, of the finished runs
    folders: dict[int, Path]  # by seed, of all runs
    method: str  # with its variant
    recipe: Recipe  # of the first seed's run

    @property
    def name(self) -> str:
        """The row, with its value where something varies."""
        return Cell(self.label, self.value).name

    def get_values(self, column: Column) -> dict[int, float]:
        """Return the column's number of every run that has it, by seed."""
        values = {}
        for seed, results in self.results.items():
            value = column.value(results)
            if value is not None:
                values[seed] = value
        return values

    def estimate_column(self, column: Column) -> Point | None:
        """Return the column's mean over the seeds; None where no run has the number."""
        return estimate_mean(list(self.get_values(column).values()))

    def find_median(self, column: Column) -> float | None:
        """Return the column's median over the seeds; None where no run has the number."""
        values = self.get_values(column).values()
        return statistics.median(values) if values else None


def estimate_mean(values: Sequence[float]) -> Point | None:
    """Return the mean and half of its 95 % interval of Student's t; None for no values."""
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Point(mean, None)
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return Point(mean, float(quantile * stats.sem(values)))


def describe_seeds(num_finished: int, num_wanted: int, num_diverged: int) -> str:
    """Say how many seeds have finished, of how many where some have not: `2 of 3, 1 diverged`."""
    text = str(num_finished)
    if num_finished != num_wanted:
        text += f" of {num_wanted}"
    if num_diverged:
        text += f", {num_diverged} diverged"
    return text


def collect_groups(sweep: Sweep) -> list[Group]:
    """Return every group of the table, those at own learning rates first, then in its order.

    Raises:
        UserError: runs whose recipes have the same model, data or benchmarks were made with
            different content of them.
    """
    check_inputs(sweep)
    groups = []
    for cell in sweep.list_cells():
        for rate, runs in sweep.list_eval_runs(cell).items():
            groups.append(_make_group(sweep, cell, rate, runs))
    return sorted(groups, key=lambda group: group.rate != "own")


def _make_group(sweep: Sweep, cell: Cell, rate: Rate, runs: Sequence[Run]) -> Group:
    """Read the results of a cell's runs at one learning rate."""
    folders = {run.recipe.train.seed: sweep.find_folder(run) for run in runs}
    results = {}
    for seed, folder in folders.items():
        found = find_run_results(folder)
        if found is not None:
            results[seed] = found
    recipe, grid = runs[0].recipe, list(sweep.read_tuning_losses(cell))
    lr = recipe.train.lr
    return Group(
        label=cell.label,
        value=cell.value,
        rate=rate,
        lr=lr,
        at_edge=rate == "own" and len(grid) > 1 and lr in (min(grid), max(grid)),
        num_wanted=len(runs),
        num_diverged=sum(map(has_diverged, folders.values())),
        results=results,
        folders=folders,
        method=recipe.label,
        recipe=recipe,
    )


def list_columns(sweep: Sweep, groups: Sequence[Group]) -> list[Column]:
    """Return the table's columns: benchmarks, then what else at least one run has a number of."""
    benchmarks = list_benchmarks(sweep.table)
    columns = []
    for name in benchmarks:
        value = partial(_get_score, benchmark=name)
        columns.append(Column(f"{name} (%)", value, ".1f", "high", limits=PERCENT))
    if len(benchmarks) > 1:
        mean = partial(_average_scores, benchmarks=benchmarks)
        columns.append(Column("mean (%)", mean, ".1f", "high", limits=PERCENT))
    for column in [*_list_development_columns(groups), *OTHER_COLUMNS]:
        if any(group.get_values(column) for group in groups):
            columns.append(column)
    return columns


def _list_development_columns(groups: Sequence[Group]) -> list[Column]:
    """Return the columns of scores of development rows: of the last epoch, then of the best one.

    The best epoch is chosen by the same rows, so its score is higher than on others. The two are
    never in one column.
    """
    found: dict[tuple[str, str], None] = {}  # name of the rows, metric; in order
    for group in groups:
        for results in group.results.values():
            for name, score in results.scores.items():
                if isinstance(score, TaskScore):
                    found |= {(name, metric): None for metric in score.last.values}
    columns = []
    for epoch in ("last", "best"):
        for name, metric in found:
            value = partial(_get_development_score, name=name, epoch=epoch, metric=metric)
            title = f"{name} {metric}, {epoch} epoch (%)"
            limits = CORRELATION if metric in CORRELATIONS else PERCENT
            columns.append(Column(title, value, ".1f", "high", has_median=True, limits=limits))
    return columns


def _get_development_score(
    results: RunResults, name: str, epoch: Literal["last", "best"], metric: str
) -> float | None:
    """Return a run's score of development rows in percent."""
    score = results.scores.get(name)
    if not isinstance(score, TaskScore):
        return None
    scored = score.last if epoch == "last" else score.best
    return 100 * scored.values[metric]


def _get_score(results: RunResults, benchmark: str) -> float | None:
    """Return a run's score of a benchmark in percent."""
    score = results.scores.get(benchmark)
    return None if score is None else 100 * score.accuracy


def _average_scores(results: RunResults, benchmarks: Sequence[str]) -> float | None:
    """Return the mean score of a run in percent; None unless it has all of them."""
    scores = [_get_score(results, benchmark) for benchmark in benchmarks]
    return None if None in scores else sum(scores) / len(scores)


def _get_other_text_loss(results: RunResults, when: Literal["before", "after"]) -> float | None:
    """Return a run's loss on the other text before or after training."""
    prediction = _get_other_text(results, when)
    return None if prediction is None else prediction.loss


def _get_other_text_accuracy(results: RunResults, when: Literal["before", "after"]) -> float | None:
    """Return a run's accuracy on the other text before or after training, in percent."""
    prediction = _get_other_text(results, when)
    if prediction is None or prediction.accuracy is None:
        return None
    return 100 * prediction.accuracy


def _get_other_text(results: RunResults, when: Literal["before", "after"]) -> Prediction | None:
    """Return what a run measured on the other text before or after training."""
    if results.other_text is None:
        return None
    return results.other_text.before if when == "before" else results.other_text.after


def get_held_out_loss(results: RunResults) -> float | None:
    """Return a run's held-out loss after training."""
    return None if results.held_out is None else results.held_out.after.loss


def _get_trained_millions(results: RunResults) -> float | None:
    """Return how many million parameters a run trained."""
    return None if results.trained_parameters is None else results.trained_parameters / 1e6


OTHER_COLUMNS = [
    Column("held-out loss", get_held_out_loss, ".4f", "low"),
    Column("other-text loss before", lambda r: _get_other_text_loss(r, "before"), ".3f"),
    Column("other-text loss after", lambda r: _get_other_text_loss(r, "after"), ".3f", "low"),
    Column(
        "other-text accuracy before (%)",
        lambda r: _get_other_text_accuracy(r, "before"),
        ".1f",
        limits=PERCENT,
    ),
    Column(
        "other-text accuracy after (%)",
        lambda r: _get_other_text_accuracy(r, "after"),
        ".1f",
        "high",
        limits=PERCENT,
    ),
    Column("trained parameters (M)", _get_trained_millions, ".3f"),
    Column("calibration (s)", lambda r: r.seconds.calibration, ".1f"),
    Column("training (s)", lambda r: r.seconds.training, ".1f"),
    Column("peak memory (GiB)", lambda r: r.peak_gib, ".2f"),
]
