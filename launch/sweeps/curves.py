"""The curve of each row over learning rates: what was measured at every rate, and around the best."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from launch.run.results import find_run_results
from launch.sweeps.rates import find_best_rate, find_neighbours, have_all_diverged
from launch.sweeps.summary import Point, describe_seeds, estimate_mean, get_held_out_loss
from launch.sweeps.table import Cell, Rate, Sweep, has_diverged, has_ended


class FreshSeeds(NamedTuple):
    """The held-out loss over the fresh seeds of one learning rate. A diverged seed is in no mean."""

    mean: Point | None  # None where no seed has a loss
    num_finished: int
    num_wanted: int
    num_diverged: int

    @property
    def is_complete(self) -> bool:
        """Whether every seed is in the mean."""
        return self.num_finished == self.num_wanted

    def describe(self) -> str:
        """Say how many seeds are in the mean."""
        return describe_seeds(self.num_finished, self.num_wanted, self.num_diverged)


class RatePoint(NamedTuple):
    """What is known of one learning rate of a row."""

    rate: float
    loss: float | None  # held-out, on the seed that chooses; infinite if diverged, None if not run
    fresh: FreshSeeds | None = None  # None where none has ended at this rate


@dataclass(frozen=True)
class RateCurve:
    """The held-out loss of a row by learning rate."""

    cell: Cell
    losses: dict[float, float | None]  # see Sweep.read_tuning_losses
    own: float | None  # the best rate; None until it is known
    fresh: dict[float, FreshSeeds]  # rate -> held-out loss over the seeds that ended there

    @property
    def label(self) -> str:
        """The row, with its value where something varies."""
        return self.cell.name

    def list_finite(self) -> dict[float, float]:
        """Return the finite losses, by rate."""
        return {
            rate: loss
            for rate, loss in self.losses.items()
            if loss is not None and math.isfinite(loss)
        }

    def list_neighbours(self) -> list[RatePoint | None]:
        """Return the next lower rate, the best and the next higher; None where there is none."""
        if self.own is None:
            return [None, None, None]
        below, above = find_neighbours(list(self.losses), self.own)
        points: list[RatePoint | None] = []
        for rate in (below, self.own, above):
            known = None if rate is None else (rate, self.losses[rate], self.fresh.get(rate))
            points.append(known and RatePoint(*known))
        return points


def collect_rate_curves(sweep: Sweep) -> list[RateCurve]:
    """Return the curve of every cell that has begun; none where rates are not chosen."""
    curves = []
    for cell in sweep.list_cells() if sweep.table.learning_rates else []:
        losses = sweep.read_tuning_losses(cell)
        if any(loss is not None for loss in losses.values()):
            own = find_best_rate(losses)
            curves.append(RateCurve(cell, losses, own, _collect_fresh(sweep, cell)))
    return curves


def group_by_value(curves: Sequence[RateCurve]) -> dict[str, list[RateCurve]]:
    """Return the curves that stand in one figure, by the text of the value that varies, or \"\".

    At other values losses may be other numbers: those of another task, or on other rows.
    """
    groups: dict[str, list[RateCurve]] = {}
    for curve in curves:
        value = "" if curve.cell.value is None else str(curve.cell.value)
        groups.setdefault(value, []).append(curve)
    return groups


def _collect_fresh(sweep: Sweep, cell: Cell) -> dict[float, FreshSeeds]:
    """Return the held-out loss over fresh seeds, by learning rate."""
    fresh = {}
    for runs in sweep.list_eval_runs(cell).values():
        folders = [sweep.find_folder(run) for run in runs]
        results = [found for found in map(find_run_results, folders) if found is not None]
        losses = [loss for loss in map(get_held_out_loss, results) if loss is not None]
        num_diverged = sum(map(has_diverged, folders))
        if losses or num_diverged:
            mean = estimate_mean(losses)
            seeds = FreshSeeds(mean, len(losses), len(runs), num_diverged)
            fresh[runs[0].recipe.train.lr] = seeds
    return fresh


def list_missing(sweep: Sweep) -> list[str]:
    """Name what has not been run yet of every cell, as `row: what`."""
    missing = []
    for cell in sweep.list_cells():
        parts = []
        if sweep.table.learning_rates:
            rates = [rate for rate, loss in sweep.read_tuning_losses(cell).items() if loss is None]
            if rates:
                seed = sweep.table.learning_rates.seed
                parts.append(f"rate {', '.join(f'{rate:g}' for rate in rates)} on seed {seed}")
                parts.append("its own rate on every seed")
        for rate, runs in sweep.list_eval_runs(cell).items():
            seeds = []
            for run in runs:
                if not has_ended(sweep.find_folder(run)):
                    seeds.append(run.recipe.train.seed)
            if seeds:
                parts.append(f"{_name_rate(rate)}seed {', '.join(map(str, seeds))}")
        if parts:
            missing.append(f"{cell.name}: {'; '.join(parts)}")
    return missing


def list_exhausted(sweep: Sweep) -> list[Cell]:
    """List the cells whose every learning rate diverged: they have no rate of their own, nor will."""
    cells = sweep.list_cells() if sweep.table.learning_rates else []
    return [cell for cell in cells if have_all_diverged(sweep.read_tuning_losses(cell))]


def _name_rate(rate: Rate) -> str:
    """Return where a missing seed is missing, with a space behind it."""
    names = {"own": "at its own rate, ", "common": "at the common rate, ", "recipe": ""}
    return names.get(rate, f"next {rate}, ")


def format_loss(point: RatePoint | None) -> str:
    """Return a rate with its loss: `0.001: 0.7312; fresh 0.7350 ± 0.0041 (2 of 3)`."""
    if point is None:
        return ""
    text = "not run" if point.loss is None else f"{point.loss:.4f}"
    if point.loss is not None and not math.isfinite(point.loss):
        text = "diverged"
    if point.fresh is not None:
        text += f"; fresh{_format_fresh(point.fresh)}"
    return f"{point.rate:g}: {text}"


def _format_fresh(fresh: FreshSeeds) -> str:
    """Return the mean over fresh seeds with a space before it, and how many they are where some lack."""
    text = ""
    if fresh.mean is not None:
        half = "" if fresh.mean.half is None else f" ± {fresh.mean.half:.4f}"
        text += f" {fresh.mean.mean:.4f}{half}"
    return text if fresh.is_complete else f"{text} ({fresh.describe()})"
