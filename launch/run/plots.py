"""Draw a run's losses and gradient norms, and give every other figure its size, colours and file.

The lines of a panel differ in colour, style and marker, so they can also be told apart in black and
white. A panel tells at most seven lines apart. More lines are spread over several panels, and each
panel shows the lines of the others in grey.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.run.best import list_score_names, list_scored_steps
from launch.run.metrics import Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colour-blind safe palette of M. Okabe and K. Ito, https://jfly.uni-koeln.de/color/
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LINE_STYLES = ["-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (1, 1))]
MARKERS = "os^vDPX"
MAX_LINES = len(COLOURS)  # that a panel tells apart
GREY = "#BBBBBB"  # of lines that another panel tells apart
DPI = 150

# Field of metrics.jsonl that is plotted -> label of its axis.
METRIC_LABELS = {
    "loss": "training loss (mean over answer tokens, or over rows with labels)",
    "grad_norm": "gradient norm before clipping",
}


def make_figure(
    columns: int, rows: int, width: float, height: float
) -> tuple["Figure", np.ndarray]:
    """Make an empty figure of panels that are `width` x `height` inches each.

    Returns:
        The figure, and its (rows, columns) array of axes.
    """
    # matplotlib takes a second to import, and most commands draw nothing.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(
        rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False
    )


def save_figure(figure: "Figure", path: Path) -> Path:
    """Write a figure to `path`, close it, and return `path`. Raises OSError."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
    return path


def style_line(index: int) -> dict[str, Any]:
    """Return matplotlib's arguments for the line with this index in its panel."""
    return {
        "color": COLOURS[index],
        "linestyle": LINE_STYLES[index],
        "marker": MARKERS[index],
    }


def space_markers(index: int, num_points: int) -> tuple[int, int]:
    """Return the first marked point of a line, and the distance from one marked point to the next.

    A line has about eight markers. Lines with another index start at another point, so that the
    markers of lines that coincide do not cover each other.
    """
    distance = max(1, num_points // 8)
    return index * distance // MAX_LINES, distance


def split_labels(labels: Sequence[str]) -> list[list[str]]:
    """Split labels into parts of equal size, none larger than a panel can tell apart."""
    num_parts = -(-len(labels) // MAX_LINES)
    size = -(-len(labels) // num_parts)
    return [list(labels[start : start + size]) for start in range(0, len(labels), size)]


def plot_runs(runs: Mapping[str, Sequence[Metrics]], folder: Path) -> list[Path]:
    """Draw loss.png and grad_norm.png in `folder`, and scores.png if runs were scored while training.

    Args:
        runs: label -> the run's steps; a curve for each.

    Returns:
        The paths of the files.
    """
    parts = split_labels(list(runs))
    paths = []
    for key, label in METRIC_LABELS.items():
        points = {}
        for name, steps in runs.items():
            points[name] = ([step["step"] for step in steps], [step[key] for step in steps])
        figure, axes = make_figure(len(parts), 1, 6, 3.6)
        for axis, part in zip(axes.flat, parts, strict=True):
            _draw_lines(axis, points, part)
            axis.set(xlabel="optimiser step", ylabel=label)
            axis.legend()
            axis.grid(alpha=0.3)
        paths.append(save_figure(figure, folder / f"{key}.png"))
    return paths + _plot_scores(runs, parts, folder)


def _plot_scores(
    runs: Mapping[str, Sequence[Metrics]], parts: Sequence[list[str]], folder: Path
) -> list[Path]:
    """Draw scores.png, a row of panels for each score while training; nothing without scores."""
    names = dict.fromkeys(name for steps in runs.values() for name in list_score_names(steps))
    if not names:
        return []
    figure, axes = make_figure(len(parts), len(names), 6, 3)
    for row, name in zip(axes, names, strict=True):
        points, metrics = {}, set()
        for label, steps in runs.items():
            scored = list_scored_steps(steps, name)
            points[label] = ([one.step for one in scored], [one.value for one in scored])
            metrics |= {one.metric for one in scored}
        for axis, part in zip(row, parts, strict=True):
            _draw_lines(axis, points, part)
            axis.set(xlabel="optimiser step", ylabel=f"{name}: {', '.join(sorted(metrics))}")
            axis.legend()
            axis.grid(alpha=0.3)
    return [save_figure(figure, folder / "scores.png")]


def _draw_lines(
    axis: "Axes", points: Mapping[str, tuple[list[int], list[float]]], part: list[str]
) -> None:
    """Draw a line for each label of `points`, those that are not in `part` in grey."""
    for label, line in points.items():
        if label not in part:
            axis.plot(*line, color=GREY, linewidth=0.7, zorder=1)
    for index, label in enumerate(part):
        axis.plot(
            *points[label],
            **style_line(index),
            markevery=space_markers(index, len(points[label][0])),
            markersize=4,
            label=label,
        )
