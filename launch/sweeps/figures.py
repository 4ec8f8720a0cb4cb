"""Draw a table's figures: losses by rate, metrics by step, scores, scores against what varies, effective ranks."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from launch.calibration.effective_rank import (
    RankChange,
    average_by_kind,
    plot_effective_ranks,
    read_effective_ranks,
)
from launch.run import plots
from launch.run.metrics import read_metrics
from launch.sweeps.blocks import RATES
from launch.sweeps.curves import collect_rate_curves
from launch.sweeps.rate_figure import draw_rate_curves
from launch.sweeps.summary import Column, Group, Point, list_columns
from launch.sweeps.table import Rate, Sweep, list_benchmarks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOW = 5  # steps of the moving average of noisy curves
OFFSET = 0.28  # between the points of one row of scores
MARGIN = 2  # of an axis beyond the limits of its column, for the markers there

Curves = Mapping[str, Sequence[Sequence[float]]]
"""Label of a line -> a value at every step, for each of the line's runs."""


def draw_figures(sweep: Sweep, groups: Sequence[Group], folder: Path) -> list[Path]:
    """Draw every figure that the finished runs allow, as `folder`/TABLE_<what>.png.

    Returns:
        The paths of the figures.
    """
    curves = collect_rate_curves(sweep)
    paths = []
    if curves:
        paths.append(draw_rate_curves(curves, _get_path(sweep, folder, "rates")))
    finished = [g for g in groups if g.results and g.rate not in ("below", "above")]
    if not finished:
        return paths
    rates = list(dict.fromkeys(group.rate for group in finished))
    for rate in rates:
        members = [group for group in finished if group.rate == rate]
        suffix = f"_{rate}" if len(rates) > 1 else ""
        for key, label in plots.METRIC_LABELS.items():
            path = _get_path(sweep, folder, key + suffix)
            panels = collect_curves(sweep, members, key, rate)
            paths.append(draw_curves(panels, label, path, is_log=key == "grad_norm"))

    # Where learning rates are chosen, these are the rows at their own.
    first = [group for group in finished if group.rate == rates[0]]
    for column in _choose_drawn_columns(sweep, finished):
        path = _get_path(sweep, folder, re.sub(r"[^\w-]+", "_", column.title.removesuffix(" (%)")))
        if draws_by_value(sweep):
            lines = collect_lines(first, column)
            x_label = sweep.table.vary.fields[0]
            paths.append(draw_scores_by_value(lines, x_label, column, path))
        else:
            paths.append(draw_scores(collect_points(finished, column), column, path))

    ranks = _collect_effective_ranks(first)
    if ranks:
        paths.append(plot_effective_ranks(ranks, _get_path(sweep, folder, "effective_rank")))
    return paths


def varies_task(sweep: Sweep) -> bool:
    """Return whether tasks vary: then a score is of one of them, and is not drawn against the tasks."""
    vary = sweep.table.vary
    return vary is not None and "task.name" in vary.fields


def draws_by_value(sweep: Sweep) -> bool:
    """Return whether scores are drawn against what varies, and not row by row."""
    return sweep.table.vary is not None and not varies_task(sweep)


def joins_tasks(sweep: Sweep, column: Column) -> bool:
    """Return whether a figure of the column would join the numbers of different tasks.

    Where tasks vary each development score is of one of them; a loss is of all.
    """
    return varies_task(sweep) and not column.title.endswith(" epoch (%)")


def _choose_drawn_columns(sweep: Sweep, groups: Sequence[Group]) -> list[Column]:
    """Return the columns with a figure: scores, those of the last epoch alone, and held-out loss."""
    scores = [f"{name} (%)" for name in [*list_benchmarks(sweep.table), "mean"]]
    wanted = [*scores, "held-out loss"]
    return [
        column
        for column in list_columns(sweep, groups)
        if (column.title in wanted or column.title.endswith(", last epoch (%)"))
        and not joins_tasks(sweep, column)
        and any(group.get_values(column) for group in groups)
    ]


def _get_path(sweep: Sweep, folder: Path, what: str) -> Path:
    """Return the path of the figure that shows `what`."""
    return folder / f"{sweep.name}_{what}.png"


def collect_curves(
    sweep: Sweep, groups: Sequence[Group], key: str, rate: Rate
) -> dict[str, dict[str, list[list[float]]]]:
    """Return the panels of a figure of the metric `key` by step, as title -> curves.

    Rows are panels where something varies, and lines of one panel where nothing does.
    """
    panels: dict[str, dict[str, list[list[float]]]] = {}
    for group in groups:
        if sweep.table.vary:
            title, line = group.label, str(group.value)
        else:
            title, line = RATES[rate], group.label
        runs = [read_metrics(group.folders[seed]) for seed in group.results]
        panels.setdefault(title, {})[line] = [[step[key] for step in steps] for steps in runs]
    return panels


def collect_points(groups: Sequence[Group], column: Column) -> dict[str, dict[str, Point]]:
    """Return the points of a figure of scores, as row -> learning rate -> mean."""
    rows: dict[str, dict[str, Point]] = {}
    for group in groups:
        point = group.estimate_column(column)
        if point is not None:
            kind = RATES[group.rate]
            if group.rate == "common":
                kind += f", {group.lr:g}"
            rows.setdefault(group.label, {})[kind] = point
    return rows


def collect_lines(groups: Sequence[Group], column: Column) -> dict[str, dict[float | str, Point]]:
    """Return the lines of a figure of scores by value, as row -> value -> mean.

    A value that is no number, such as a list or a whole section, is its text.
    """
    lines: dict[str, dict[float | str, Point]] = {}
    for group in groups:
        point = group.estimate_column(column)
        if point is not None:
            is_number = isinstance(group.value, int | float)
            value = group.value if is_number else str(group.value)
            lines.setdefault(group.label, {})[value] = point
    return lines


def order_values(
    lines: Mapping[str, Mapping[float | str, Point]],
) -> tuple[list[float | str], bool]:
    """Return the values of all lines in the order of their axis, and whether that is logarithmic.

    Positive numbers ascend and are spaced by their logarithm; anything else is in the table's order,
    and evenly spaced.
    """
    values = list(dict.fromkeys(value for points in lines.values() for value in points))
    is_log = all(isinstance(value, int | float) and value > 0 for value in values)
    return sorted(values) if is_log else values, is_log


def get_axis_limits(column: Column) -> tuple[float, float]:
    """Return what an axis of the column shows at most: the interval of few seeds may reach further."""
    low, high = column.limits or (-math.inf, math.inf)
    return low - MARGIN, high + MARGIN


def _collect_effective_ranks(groups: Sequence[Group]) -> dict[str, dict[str, RankChange]]:
    """Return the effective ranks of each group's first run, where they were measured."""
    rows = {}
    for group in groups:
        first_run = next(iter(group.folders.values()))
        changes = read_effective_ranks(first_run)
        if changes:
            rows[group.name] = average_by_kind(changes)
    return rows


def draw_curves(panels: Mapping[str, Curves], label: str, path: Path, is_log: bool = False) -> Path:
    """Draw one value by optimiser step, and return `path`.

    A line is the moving average over steps, and the mean over its runs that are still there. The
    range from the least to the greatest of them is shaded.

    Args:
        panels: title -> curves.
        label: of the y axis.
        is_log: whether the y axis is logarithmic.
    """
    drawn = _split_panels(panels)
    num_columns = min(3, len(drawn))
    num_rows = -(-len(drawn) // num_columns)
    width = 4.6 if num_columns > 1 else 6.5
    figure, axes = plots.make_figure(num_columns, num_rows, width, 4.2)
    used, unused = axes.flat[: len(drawn)], axes.flat[len(drawn) :]
    for axis, (title, part, curves) in zip(used, drawn, strict=True):
        _draw_panel(axis, part, curves)
        axis.set(xlabel="optimiser step", ylabel=label, title=title)
        if is_log:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(_format_minor_tick)
        _add_legend(axis)
    _share_limits(list(used))
    for axis in unused:
        axis.set_visible(False)
    return plots.save_figure(figure, path)


def _split_panels(panels: Mapping[str, Curves]) -> list[tuple[str, list[str], Curves]]:
    """Split panels of too many lines. Returns title, lines that are told apart, and all curves."""
    split = []
    for title, curves in panels.items():
        parts = plots.split_labels(list(curves))
        for number, part in enumerate(parts, start=1):
            suffix = f" ({number} of {len(parts)}, others grey)" if len(parts) > 1 else ""
            split.append((title + suffix, part, curves))
    return split


def _draw_panel(axis: "Axes", part: Sequence[str], curves: Curves) -> None:
    """Draw the curves of one panel, those that are not in `part` in grey."""
    for name, runs in curves.items():
        if name not in part:
            steps, mean, _, _ = smooth_runs(runs)
            axis.plot(steps, mean, color=plots.GREY, linewidth=0.7, zorder=1)
    for index, name in enumerate(part):
        steps, mean, low, high = smooth_runs(curves[name])
        style = plots.style_line(index)
        axis.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axis.plot(
            steps,
            mean,
            **style,
            markevery=plots.space_markers(index, len(steps)),
            markersize=4,
            linewidth=1.3,
            label=name,
            zorder=3,
        )


def smooth_runs(
    runs: Sequence[Sequence[float]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Average each run's values over WINDOW steps.

    Returns:
        The middle steps of the windows, and the mean, least and greatest of the runs there. Runs may
        differ in length (train.patience): the later steps are those of the longer ones.
    """
    window = min(WINDOW, *map(len, runs))
    weights = np.ones(window) / window
    averaged = np.ma.masked_all((len(runs), max(map(len, runs)) - window + 1))
    for row, run in zip(averaged, runs, strict=True):
        row[: len(run) - window + 1] = np.convolve(run, weights, mode="valid")
    steps = np.arange(averaged.shape[1]) + 1 + (window - 1) / 2
    mean, low, high = averaged.mean(0), averaged.min(0), averaged.max(0)
    return steps, mean.filled(np.nan), low.filled(np.nan), high.filled(np.nan)


def _format_minor_tick(value: float, _: int) -> str:
    """Return the label of a minor tick of a logarithmic axis: 2 and 5 of each decade have one."""
    first_digit = f"{value:e}"[0]
    return f"{value:g}" if first_digit in "25" else ""


def draw_scores(rows: Mapping[str, Mapping[str, Point]], column: Column, path: Path) -> Path:
    """Draw a row for each label, with a point and its interval for each kind; return `path`.

    Args:
        rows: label -> kind, such as the learning rate it was trained at -> mean.
        column: whose means these are, for the x axis.
    """
    figure, axes = plots.make_figure(1, 1, 6.5, 1.2 + 0.36 * len(rows))
    (axis,) = axes.flat
    kinds = list(dict.fromkeys(kind for points in rows.values() for kind in points))
    for i, kind in enumerate(kinds):
        shift = (i - (len(kinds) - 1) / 2) * OFFSET
        points = {y + shift: row[kind] for y, row in enumerate(rows.values()) if kind in row}
        axis.errorbar(
            [point.mean for point in points.values()],
            list(points),
            xerr=[_draw_half(point.half) for point in points.values()],
            fmt=plots.MARKERS[i],
            color=plots.COLOURS[i],
            markerfacecolor=plots.COLOURS[i] if i == 0 else "white",
            markersize=5,
            capsize=2,
            linewidth=1,
            label=kind,
        )
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    axis.set_xlim(_clip_limits(axis.get_xlim(), column))
    axis.set_xlabel(column.title)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncol=2, fontsize="small", frameon=False)
    return plots.save_figure(figure, path)


def draw_scores_by_value(
    lines: Mapping[str, Mapping[float | str, Point]], x_label: str, column: Column, path: Path
) -> Path:
    """Draw scores against what varies, with a line for each label, and return `path`.

    Args:
        lines: label -> value -> mean.
        column: whose means these are, for the y axis.
    """
    parts = plots.split_labels(list(lines))
    figure, axes = plots.make_figure(len(parts), 1, 5.2, 4.4)
    values, is_log = order_values(lines)
    x = {value: value if is_log else i for i, value in enumerate(values)}
    for axis, part in zip(axes.flat, parts, strict=True):
        for name, points in lines.items():
            if name not in part:
                places = sorted((x[value], point.mean) for value, point in points.items())
                axis.plot(*zip(*places, strict=True), color=plots.GREY, linewidth=0.7, zorder=1)
        for index, name in enumerate(part):
            places = sorted((x[value], *point) for value, point in lines[name].items())
            axis.errorbar(
                [place for place, _, _ in places],
                [mean for _, mean, _ in places],
                yerr=[_draw_half(half) for _, _, half in places],
                **plots.style_line(index),
                markersize=5,
                capsize=2,
                linewidth=1.3,
                label=name,
            )
        if is_log:
            axis.set_xscale("log", base=2)
        # Ticks at the values that were run, not at matplotlib's powers of two.
        axis.set_xticks(list(x.values()), [str(value) for value in values])
        axis.minorticks_off()
        axis.set(xlabel=x_label, ylabel=column.title)
        axis.set_ylim(_clip_limits(axis.get_ylim(), column))
        _add_legend(axis)
    _share_limits(list(axes.flat))
    return plots.save_figure(figure, path)


def _draw_half(half: float | None) -> float:
    """Return what matplotlib draws: no bar, not one of width 0, where a single seed has no interval."""
    return math.nan if half is None else half


def _clip_limits(limits: tuple[float, float], column: Column) -> tuple[float, float]:
    """Return the limits of an axis, cut to those of its column."""
    least, greatest = get_axis_limits(column)
    return max(limits[0], least), min(limits[1], greatest)


def _add_legend(axis: "Axes") -> None:
    """Add a grid, and a legend below the axis."""
    axis.grid(alpha=0.3)
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2, fontsize="small", frameon=False
    )


def _share_limits(axes: Sequence["Axes"]) -> None:
    """Give all axes the y limits that hold the values of each."""
    limits = [axis.get_ylim() for axis in axes]
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    for axis in axes:
        axis.set_ylim(low, high)
