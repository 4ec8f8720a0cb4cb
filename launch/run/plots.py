"""Figures of runs and tables: Okabe and Ito's colours with a line style and a marker each, so that they print in black.

At most seven lines are told apart in a panel; more are spread over panels, in each of which the others are grey.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launch.training.loop import Metrics

COLOURS = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
]  # Okabe and Ito
LINES = ["-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (1, 1))]
MARKERS = "os^vDPX"
MOST = len(COLOURS)  # lines of a panel
WINDOW = 5  # steps of the moving average of noisy curves
LABELS = {"loss": "loss (nats per answer token)", "grad_norm": "gradient norm before clipping"}
GREY = "#BBBBBB"


class Point(NamedTuple):
    """A mean over seeds, with half of its 95 % interval; None where one seed alone says nothing of that."""

    mean: float
    half: float | None


def figure(columns: int, rows: int, width: float, height: float) -> tuple[Any, Any]:
    """An empty matplotlib figure and its (rows, columns) axes, each width x height inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(
        rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False
    )


def save(of: Any, path: Path) -> Path:
    """Write and close a figure."""
    from matplotlib import pyplot

    of.savefig(path, dpi=150)
    pyplot.close(of)
    return path


def plot(runs: Mapping[str, Sequence[Metrics]], folder: Path) -> list[Path]:
    """loss.png and grad_norm.png in `folder`, with one curve for each of `runs` (label -> its steps)."""
    paths = []
    parts = _parts(runs)
    for key, label in LABELS.items():
        of, axes = figure(len(parts), 1, 6, 3.6)
        for axis, part in zip(axes.flat, parts, strict=True):
            for run in runs.keys() - set(part):
                axis.plot(*_by_step(runs[run], key), color=GREY, linewidth=0.7, zorder=1)
            for i, run in enumerate(part):
                every = max(1, len(runs[run]) // 8)
                axis.plot(
                    *_by_step(runs[run], key),
                    color=COLOURS[i],
                    linestyle=LINES[i],
                    marker=MARKERS[i],
                    markevery=(i * every // MOST, every),
                    markersize=4,
                    label=run,
                )
            axis.set(xlabel="optimiser step", ylabel=label)
            axis.legend()
            axis.grid(alpha=0.3)
        paths.append(save(of, folder / f"{key}.png"))
    return paths


def _by_step(steps: Sequence[Metrics], key: str) -> tuple[list[int], list[float]]:
    return [step["step"] for step in steps], [step[key] for step in steps]


def curves(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    label: str,
    path: Path,
    log: bool = False,
) -> Path:
    """One value by optimiser step: the mean over the runs of a line, as a moving average, from least to most shaded.

    Args:
        panels: title -> line's label -> that value at every step, for each of the line's runs. label: of the y axis.
    """
    drawn = [
        (
            title if len(parts) == 1 else f"{title} ({number} of {len(parts)}, others grey)",
            part,
            lines,
        )
        for title, lines in panels.items()
        for parts in [_parts(lines)]
        for number, part in enumerate(parts, start=1)
    ]
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    of, axes = figure(columns, rows, 4.6 if columns > 1 else 6.5, 4.2)
    for axis, (title, part, lines) in zip(axes.flat, drawn, strict=False):
        for name in lines.keys() - set(part):
            axis.plot(*_smooth(lines[name])[:2], color=GREY, linewidth=0.7, zorder=1)
        for i, name in enumerate(part):
            steps, mean, low, high = _smooth(lines[name])
            every = max(1, len(steps) // 8)
            axis.fill_between(steps, low, high, color=COLOURS[i], alpha=0.12, linewidth=0)
            axis.plot(
                steps,
                mean,
                color=COLOURS[i],
                linestyle=LINES[i],
                marker=MARKERS[i],
                markevery=(i * every // MOST, every),
                markersize=4,
                linewidth=1.3,
                label=name,
                zorder=3,
            )
        axis.set(xlabel="optimiser step", ylabel=label, title=title)
        if log:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "25" else "")
        _legend(axis)
    _share_limits([axis for axis, _ in zip(axes.flat, drawn, strict=False)])
    for axis in list(axes.flat)[len(drawn) :]:
        axis.set_visible(False)
    return save(of, path)


def scores(rows: Mapping[str, Mapping[str, Point]], label: str, path: Path) -> Path:
    """A row for each label, and in it a point with its interval for each kind, such as the rate it was trained at."""
    of, axes = figure(1, 1, 6.5, 1.2 + 0.36 * len(rows))
    (axis,) = axes.flat
    kinds = list(dict.fromkeys(kind for points in rows.values() for kind in points))
    for i, kind in enumerate(kinds):
        shift = (i - (len(kinds) - 1) / 2) * 0.28
        found = [
            (number + shift, points[kind])
            for number, points in enumerate(rows.values())
            if kind in points
        ]
        axis.errorbar(
            [point.mean for _, point in found],
            [y for y, _ in found],
            xerr=[point.half or 0 for _, point in found],
            fmt=MARKERS[i],
            color=COLOURS[i],
            markerfacecolor=COLOURS[i] if i == 0 else "white",
            markersize=5,
            capsize=2,
            linewidth=1,
            label=kind,
        )
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(_possible(axis.get_xlim(), label))
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)
    of.legend(loc="outside lower center", ncol=2, fontsize="small", frameon=False)
    return save(of, path)


def _possible(limits: tuple[float, float], label: str) -> tuple[float, float]:
    """Limits of an axis: of percentages none outside 0 to 100, though an interval of few seeds may run past."""
    low, high = limits
    return (max(low, -2), min(high, 102)) if label.endswith("(%)") else limits


def against(lines: Mapping[str, Mapping[Any, Point]], x: str, y: str, path: Path) -> Path:
    """Scores against what varies: a line for each label, its points by value, with their intervals.

    Numbers are spaced by their logarithm, anything else evenly.
    """
    parts = _parts(lines)
    of, axes = figure(len(parts), 1, 5.2, 4.4)
    values = list(dict.fromkeys(value for points in lines.values() for value in points))
    numeric = all(isinstance(value, int | float) and value > 0 for value in values)
    place = {value: value if numeric else i for i, value in enumerate(values)}
    for axis, part in zip(axes.flat, parts, strict=True):
        for name in lines.keys() - set(part):
            at = sorted((place[value], point.mean) for value, point in lines[name].items())
            axis.plot(*zip(*at, strict=True), color=GREY, linewidth=0.7, zorder=1)
        for i, name in enumerate(part):
            at = sorted((place[value], *point) for value, point in lines[name].items())
            axis.errorbar(
                [x for x, _, _ in at],
                [mean for _, mean, _ in at],
                yerr=[half or 0 for _, _, half in at],
                color=COLOURS[i],
                linestyle=LINES[i],
                marker=MARKERS[i],
                markersize=5,
                capsize=2,
                linewidth=1.3,
                label=name,
            )
        if numeric:
            axis.set_xscale("log", base=2)
        axis.set_xticks(list(place.values()), [str(value) for value in values])
        axis.minorticks_off()
        axis.set(xlabel=x, ylabel=y, ylim=_possible(axis.get_ylim(), y))
        _legend(axis)
    _share_limits(list(axes.flat))
    return save(of, path)


def effective_rank(rows: Mapping[str, Mapping[str, tuple[float, float]]], path: Path) -> Path:
    """Effective ranks before (a tick) and after (a dot) for each row, in a panel for each kind of module.

    Args:
        rows: label -> kind -> (before, after); see by_kind and by_layer.
    """
    kinds = list(dict.fromkeys(kind for of in rows.values() for kind in of))
    columns = min(4, len(kinds))
    of, axes = figure(columns, -(-len(kinds) // columns), 2.7, 1.1 + 0.22 * len(rows))
    for number, (axis, kind) in enumerate(zip(axes.flat, kinds, strict=False)):
        found = [(y, *points[kind]) for y, points in enumerate(rows.values()) if kind in points]
        for y, before, after in found:
            axis.plot([before, after], [y, y], color=COLOURS[0], linewidth=1.2, zorder=2)
        axis.plot(
            [before for _, before, _ in found],
            [y for y, *_ in found],
            "|",
            color="black",
            markersize=9,
        )
        axis.plot(
            [after for *_, after in found],
            [y for y, *_ in found],
            "o",
            color=COLOURS[1],
            markersize=4.5,
        )
        axis.set_yticks(range(len(rows)), list(rows) if number % columns == 0 else [])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_title(kind, fontsize="medium")
        axis.margins(x=0.12)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    for axis in list(axes.flat)[len(kinds) :]:
        axis.set_visible(False)
    of.supxlabel(
        "effective rank of the outputs on the calibration rows: | before, dot after",
        fontsize="medium",
    )
    return save(of, path)


def by_layer(
    modules: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, tuple[float, float]]]:
    """effective_rank.json of a run as rows by layer: the how-manieth of its kind a module is."""
    rows: dict[str, dict[str, tuple[float, float]]] = {}
    seen: dict[str, int] = {}
    for name, of in modules.items():
        kind = name.rsplit(".", 1)[-1]
        seen[kind] = seen.get(kind, 0) + 1
        rows.setdefault(f"layer {seen[kind]}", {})[kind] = (of["before"], of["after"])
    return rows


def by_kind(modules: Mapping[str, Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """effective_rank.json of a run as kind -> (before, after), means over the layers."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in by_layer(modules).values():
        for kind, pair in row.items():
            found.setdefault(kind, []).append(pair)
    return {kind: tuple(np.mean(pairs, axis=0).tolist()) for kind, pairs in found.items()}


def _parts(lines: Mapping[str, Any]) -> list[list[str]]:
    """Labels in equal parts, none larger than a panel can tell apart."""
    labels = list(lines)
    size = -(-len(labels) // -(-len(labels) // MOST))
    return [labels[start : start + size] for start in range(0, len(labels), size)]


def _smooth(runs: Sequence[Sequence[float]]) -> tuple[np.ndarray, ...]:
    """Steps, and of the moving averages of `runs` their mean, least and most."""
    length = min(map(len, runs))
    window = min(WINDOW, length)
    averaged = np.array(
        [np.convolve(run[:length], np.ones(window) / window, mode="valid") for run in runs]
    )
    steps = np.arange(averaged.shape[1]) + 1 + (window - 1) / 2
    return steps, averaged.mean(0), averaged.min(0), averaged.max(0)


def _legend(axis: Any) -> None:
    axis.grid(alpha=0.3)
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2, fontsize="small", frameon=False
    )


def _share_limits(axes: Sequence[Any]) -> None:
    low, high = min(axis.get_ylim()[0] for axis in axes), max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(low, high)
