"""Draw the held-out loss by learning rate: a line for each row, its best rate marked."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.run import plots
from launch.sweeps.curves import RateCurve, group_by_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ZOOM = 1.5  # factor on the rates around the bests that the second panel still shows
MARGIN = 0.15  # of the range of the y axis, above and below
LABEL_SPACE = 0.07  # of the height of a panel, between two labels


def draw_rate_curves(curves: Sequence[RateCurve], path: Path) -> Path:
    """Draw each row's held-out loss by learning rate, and return `path`.

    The left panel shows every rate, the right one the best rates and their neighbours, with the
    rows' names at the ends of their lines. A circle marks a row's best rate, and a cross at the top
    a rate at which its run diverged. Each value that varies has panels of its own.
    """
    panels = []  # of each row of panels: value, its curves, and the lines that are told apart
    for value, members in group_by_value(curves).items():
        parts = plots.split_labels([curve.cell.label for curve in members])
        panels += [(value, members, part) for part in parts]
    figure, axes = plots.make_figure(2, len(panels), 4.6, 4.0)
    for pair, (value, members, part) in zip(axes, panels, strict=True):
        _draw_panels(pair, members, part, f"{value}: " if value else "")
    return plots.save_figure(figure, path)


def _draw_panels(
    pair: Sequence["Axes"], curves: Sequence[RateCurve], part: Sequence[str], prefix: str
) -> None:
    """Draw a row of two panels: every rate, and those around the best."""
    whole, near = pair
    rates = sorted({rate for curve in curves for rate in curve.losses})
    for axis in (whole, near):
        _draw_curves(axis, curves, part)
        axis.set_xscale("log")
        axis.set(xlabel="learning rate", ylabel="held-out loss")
        axis.grid(alpha=0.3)
        axis.set_xticks(rates, list(map(_format_rate, rates)), rotation=60, fontsize="small")
        axis.minorticks_off()
    whole.set_title(f"{prefix}every rate")
    near.set_title(f"{prefix}around the best")
    _set_whole_limits(whole, curves)
    _set_near_limits(near, curves)
    _mark_diverged(whole, curves, part)
    _name_lines(near, curves, part)


def _draw_curves(axis: "Axes", curves: Sequence[RateCurve], part: Sequence[str]) -> None:
    """Draw the lines of one panel, those that are not in `part` in grey."""
    for curve in curves:
        finite = curve.list_finite()
        rates, losses = list(finite), list(finite.values())
        if curve.cell.label not in part:
            axis.plot(rates, losses, color=plots.GREY, linewidth=0.7, zorder=1)
            continue
        style = _find_style(curve, part)
        axis.plot(
            rates, losses, **style, markersize=4, linewidth=1.4, label=curve.cell.label, zorder=3
        )
        if curve.own is not None:
            best = ([curve.own], [curve.losses[curve.own]])
            ring = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.8}
            axis.plot(*best, "o", color=style["color"], **ring, zorder=4)


def _format_rate(rate: float) -> str:
    """Return the label of a tick: `1.78e-3`."""
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _find_style(curve: RateCurve, part: Sequence[str]) -> dict[str, Any]:
    """Return the style of a row's line."""
    return plots.style_line(part.index(curve.cell.label))


def _set_whole_limits(axis: "Axes", curves: Sequence[RateCurve]) -> None:
    """Show every rate, and losses up to twice the range that the rows' lowest rates and bests span.

    A run that nearly diverged would flatten everything else; its line leaves the panel at the top.
    """
    rates = [rate for curve in curves for rate in curve.losses]
    axis.set_xlim(min(rates) / 1.3, max(rates) * 1.3)
    finite = [
        losses for losses in (list(curve.list_finite().values()) for curve in curves) if losses
    ]
    if finite:
        low, high = min(map(min, finite)), max(losses[0] for losses in finite)
        largest = max(map(max, finite))
        space = MARGIN * ((high - low) or abs(low) or 1)
        axis.set_ylim(low - space, min(largest, low + 2 * (high - low)) + space)


def _set_near_limits(axis: "Axes", curves: Sequence[RateCurve]) -> None:
    """Show the best rates and their neighbours, and the losses there; everything while none is known."""
    rates, losses = [], []
    for curve in curves:
        for point in curve.list_neighbours():
            if point is not None:
                rates.append(point.rate)
                losses += [point.loss] if math.isfinite(point.loss) else []
    if rates:
        axis.set_xlim(min(rates) / ZOOM, max(rates) * ZOOM)
        space = MARGIN * ((max(losses) - min(losses)) or abs(min(losses)) or 1)
        axis.set_ylim(min(losses) - space, max(losses) + space)


def _mark_diverged(axis: "Axes", curves: Sequence[RateCurve], part: Sequence[str]) -> None:
    """Mark at the top each rate at which a row's run diverged."""
    top = axis.get_ylim()[1]
    for curve in curves:
        diverged = [r for r, loss in curve.losses.items() if loss is not None and math.isinf(loss)]
        if curve.cell.label in part and diverged:
            color = _find_style(curve, part)["color"]
            marks = {"markersize": 7, "markeredgewidth": 1.8, "clip_on": False}
            axis.plot(diverged, [top] * len(diverged), "x", color=color, **marks)


def _name_lines(axis: "Axes", curves: Sequence[RateCurve], part: Sequence[str]) -> None:
    """Write each row's name to the right of the panel, joined to the last point that it shows."""
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    ends = []
    for curve in curves:
        shown = []
        for rate, loss in curve.list_finite().items():
            if left <= rate <= right and low <= loss <= high:
                shown.append((rate, loss))
        if curve.cell.label in part and shown:
            ends.append((*shown[-1], curve))
    ends.sort(key=lambda end: end[1])
    heights = _spread([(loss - low) / (high - low) for _, loss, _ in ends])
    for (rate, loss, curve), height in zip(ends, heights, strict=True):
        color = _find_style(curve, part)["color"]
        axis.annotate(
            curve.cell.label,
            xy=(rate, loss),
            xytext=(1.04, height),
            textcoords="axes fraction",
            color=color,
            va="center",
            fontsize="small",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6},
        )


def _spread(heights: Sequence[float]) -> list[float]:
    """Move ascending heights apart, to at least LABEL_SPACE, about where they are and within 0 to 1."""
    spread: list[float] = []
    for height in heights:
        spread.append(max(height, spread[-1] + LABEL_SPACE) if spread else height)
    over = max(0.0, spread[-1] - 1.0) if spread else 0.0
    return [height - over for height in spread]
