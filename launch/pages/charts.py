"""Describe charts for plotly.js: plain data that page.js draws, with a switch for every line.

The lines of a chart differ in colour, dash and marker. Text, grid and background take their colours
from page.css, for dark, light and print.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.run.plots import COLOURS

# The last colour of a plot is black, which a dark page would hide.
LINE_COLOURS = [*COLOURS[:-1], "#808080"]
# As launch.run.plots has them for matplotlib, by plotly's names.
DASHES = ["solid", "dash", "dashdot", "dot", "longdash", "longdashdot", "2px,2px"]
SYMBOLS = ["circle", "square", "triangle-up", "triangle-down", "diamond", "cross", "x"]
MAX_SHOWN = len(LINE_COLOURS)  # lines that are shown at first; the reader can switch on the others
MAX_MARKERS = 9  # of a line
MAX_POINTS = 2000  # of a line; more are averaged
DIGITS = 7  # significant, of a plotted number
# Dark to light, for ordered lines such as layers: matplotlib's viridis without its darkest and
# lightest parts, which a dark or a light page would hide.
ORDERED = ["#3b528b", "#31688e", "#26828e", "#1f9e89", "#35b779", "#5ec962"]


@dataclass
class Figure:
    """One plot: traces and layout as plotly.js takes them, and the lines that can be switched."""

    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    # label, traces (their indices), shown, colour, dash, symbol
    lines: list[dict[str, Any]]
    # The numbers as a table: titles, then a row for each line.
    numbers: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """A plot with its heading; with several figures the reader chooses one."""

    name: str  # letters, digits and hyphens, unique on the page
    title: str
    about: str  # what is shown, for the reader and for a screen reader
    figures: dict[str, Figure]  # label of the choice -> plot
    choice: str = "Show"  # label of the control that chooses


def make_figure(
    x_label: str, y_label: str, log_x: bool = False, log_y: bool = False, hover: str = "x unified"
) -> Figure:
    """Make a plot without lines.

    Args:
        hover: plotly's hovermode: `x unified` names all lines at one x, `closest` one point.
    """
    layout = {
        "xaxis": {"title": {"text": escape_label(x_label)}, "type": "log" if log_x else "linear"},
        "yaxis": {"title": {"text": escape_label(y_label)}, "type": "log" if log_y else "linear"},
        "hovermode": hover,
        "hoverlabel": {"namelength": -1},  # whole names
    }
    for axis in ("xaxis", "yaxis"):
        layout[axis] |= {"automargin": True, "exponentformat": "power"}
    layout["yaxis"]["hoverformat"] = ".5g"
    if log_y:
        layout["yaxis"]["dtick"] = "D2"  # ticks at 2 and 5 of each decade too
    return Figure([], layout, [])


def add_line(
    figure: Figure,
    label: str,
    x: Sequence[Any],
    y: Sequence[float | None],
    band: tuple[Sequence[float], Sequence[float]] | None = None,
    half: Sequence[float | None] | None = None,
    max_markers: int = MAX_MARKERS,
) -> None:
    """Add a line and its switch to a figure.

    Args:
        band: the least and the greatest value at each x, shaded.
        half: of the interval at each point, drawn as a bar; None at points without one.
        max_markers: of the line; 0 for one at every point.
    """
    style = _style_line(figure)
    trace = _make_trace(label, x, _round_all(y), "lines+markers")
    trace["line"] = {"color": style["colour"], "dash": style["dash"], "width": 2}
    trace["marker"] = _make_marker(style) | {"maxdisplayed": max_markers}
    if half is not None:
        trace["error_y"] = {"type": "data", "array": _round_all(half), "thickness": 1.3, "width": 4}
    traces = [trace]
    if band is not None:
        traces.insert(0, _shade_band(label, x, band, style["colour"]))
    _add_switch(figure, label, traces, style)


def add_ordered_line(
    figure: Figure, label: str, x: Sequence[Any], y: Sequence[float | None], colour: str
) -> None:
    """Add a thin line of a given colour and its switch; see `pick_ordered`."""
    trace = _make_trace(label, x, _round_all(y), "lines")
    trace["line"] = {"color": colour, "width": 1.4}
    style = {"colour": colour, "dash": "solid", "symbol": "none"}
    _add_switch(figure, label, [trace], style, shown=True)


def add_points(figure: Figure, label: str, x: Sequence[float], y: Sequence[float]) -> None:
    """Add points that no line joins, and their switch."""
    style = _style_line(figure) | {"dash": "none"}
    trace = _make_trace(label, x, _round_all(y), "markers")
    trace["marker"] = _make_marker(style)
    _add_switch(figure, label, [trace], style)


def add_intervals(
    figure: Figure, label: str, rows: Mapping[str, tuple[float | None, float, float | None]]
) -> None:
    """Add a point with its interval, from left to right, in each row of a figure of rows.

    Args:
        rows: label of the row -> low, value, high; None for both ends where there is no interval.
    """
    style = _style_line(figure) | {"dash": "none"}
    values = [value for _, value, _ in rows.values()]
    trace = _make_trace(label, _round_all(values), list(map(escape_label, rows)), "markers")
    trace |= {"marker": _make_marker(style), "orientation": "h", "offsetgroup": label}
    trace["error_x"] = {
        "type": "data",
        "symmetric": False,
        "array": _round_all(
            [None if high is None else high - value for _, value, high in rows.values()]
        ),
        "arrayminus": _round_all(
            [None if low is None else value - low for low, value, _ in rows.values()]
        ),
        "color": style["colour"],
        "thickness": 1.5,
        "width": 5,
    }
    _add_switch(figure, label, [trace], style)


def make_rows_figure(x_label: str, num_rows: int) -> Figure:
    """Make a figure of so many rows, the first on top, for `add_intervals`."""
    figure = make_figure(x_label, "", hover="closest")
    figure.layout["yaxis"] |= {"type": "category", "range": [num_rows - 0.5, -0.5]}
    figure.layout["xaxis"]["hoverformat"] = ".5g"
    figure.layout |= {"scattermode": "group", "scattergap": 0.6}  # points of a row side by side
    figure.layout["height"] = 150 + 40 * num_rows
    return figure


def set_ticks(figure: Figure, values: Sequence[float]) -> None:
    """Put the ticks of the x axis at `values`, and nowhere else."""
    ticks = {"tickvals": list(values), "ticktext": [f"{value:g}" for value in values]}
    figure.layout["xaxis"] |= {"tickmode": "array", **ticks}


def _make_trace(label: str, x: Sequence[Any], y: Sequence[Any], mode: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": escape_label(label),
        "x": list(x),
        "y": list(y),
        "mode": mode,
    }


def _shade_band(
    label: str, x: Sequence[Any], band: tuple[Sequence[float], Sequence[float]], colour: str
) -> dict[str, Any]:
    """Return the trace that shades a band."""
    low, high = map(_round_all, band)
    trace = _make_trace(label, [*x, *reversed(x)], [*high, *reversed(low)], "lines")
    shade = {"fill": "toself", "fillcolor": colour, "opacity": 0.18, "line": {"width": 0}}
    return trace | shade | {"hoverinfo": "skip"}


def _style_line(figure: Figure) -> dict[str, Any]:
    """Return colour, dash and symbol of the next line of a figure.

    Beyond one palette the dashes move on, so that no two of 49 lines are alike.
    """
    number = len(figure.lines)
    place, turn = number % len(LINE_COLOURS), number // len(LINE_COLOURS)
    dash = DASHES[(place + turn) % len(DASHES)]
    return {"colour": LINE_COLOURS[place], "dash": dash, "symbol": SYMBOLS[place]}


def _make_marker(style: Mapping[str, Any]) -> dict[str, Any]:
    return {"color": style["colour"], "symbol": style["symbol"], "size": 7}


def _add_switch(
    figure: Figure,
    label: str,
    traces: Sequence[dict[str, Any]],
    style: Mapping[str, Any],
    shown: bool | None = None,
) -> None:
    """Add traces to a figure, and the line of the switch that shows and hides them together."""
    first = len(figure.traces)
    figure.traces += traces
    if shown is None:
        shown = len(figure.lines) < MAX_SHOWN
    places = list(range(first, len(figure.traces)))
    figure.lines.append({"label": label, "traces": places, "shown": shown, **style})


def pick_ordered(index: int, count: int) -> str:
    """Return the colour of line `index` of `count` ordered lines, from dark to light."""
    place = index * (len(ORDERED) - 1) / max(1, count - 1)
    low = min(int(place), len(ORDERED) - 2)
    share = place - low
    parts = []
    for start in (1, 3, 5):
        first, second = (int(ORDERED[i][start : start + 2], 16) for i in (low, low + 1))
        parts.append(round(first + share * (second - first)))
    return "#{:02x}{:02x}{:02x}".format(*parts)


def average_points(values: Sequence[float | None], size: int) -> list[float | None]:
    """Return the mean of every `size` neighbours; numbers that are None or not finite are left out."""
    means = []
    for start in range(0, len(values), size):
        known = [v for v in values[start : start + size] if v is not None and math.isfinite(v)]
        means.append(math.fsum(known) / len(known) if known else None)
    return means


def list_numbers(
    figure: Figure, rows: Mapping[str, Sequence[float | None]], titles: Sequence[str]
) -> None:
    """Give a figure its numbers as a table: the titles, then the numbers of each line."""
    figure.numbers = [["line", *titles]]
    for label, values in rows.items():
        figure.numbers.append([label, *("" if v is None else f"{v:.5g}" for v in values)])


def escape_label(text: str) -> str:
    """Return a label that plotly.js shows as it is; it reads tags and entities otherwise."""
    return html.escape(text, quote=False)


def _round_all(values: Sequence[float | None]) -> list[float | None]:
    """Round to DIGITS significant digits; what is not finite becomes a gap."""
    rounded = []
    for value in values:
        is_known = value is not None and math.isfinite(value)
        rounded.append(float(f"{value:.{DIGITS}g}") if is_known else None)
    return rounded
