"""The page of a sweep: its table, its rates, curves, spectra and responses, with what is there so far."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from launch.config.loading import dump_recipe
from launch.pages.charts import (
    Chart,
    Figure,
    add_intervals,
    add_line,
    list_numbers,
    make_figure,
    make_rows_figure,
    set_ticks,
)
from launch.pages.curves import TITLES, Spectra, chart_layers
from launch.pages.generations import pack_responses
from launch.pages.records import RunRecord, make_record, read_responses, read_spectra
from launch.pages.render import Page, write_page
from launch.pages.tables import Cell, Table, tabulate_conditions, tabulate_runs
from launch.run.plots import METRIC_LABELS
from launch.sweeps.blocks import RATES, build_blocks
from launch.sweeps.curves import RateCurve, collect_rate_curves, group_by_value
from launch.sweeps.figures import (
    WINDOW,
    collect_curves,
    collect_lines,
    collect_points,
    draws_by_value,
    get_axis_limits,
    joins_tasks,
    order_values,
    smooth_runs,
)
from launch.sweeps.render import list_notes, list_recipe_notes
from launch.sweeps.summary import Column, Group, collect_groups, list_columns
from launch.sweeps.table import Run, Sweep


class ShownRun(NamedTuple):
    """The run that stands for a group where one must do: spectra, responses, conditions."""

    name: str  # label of its group
    record: RunRecord


def write_sweep_page(sweep: Sweep, path: Path) -> None:
    """Write the page of a sweep to `path`.

    Raises:
        UserError: runs that should have the same inputs were made with different ones, or the page
            cannot be written.
    """
    write_page(make_sweep_page(sweep, path), path)


def make_sweep_page(sweep: Sweep, path: Path) -> Page:
    """Put the page of a sweep together."""
    groups = collect_groups(sweep)
    runs = _list_runs(sweep)
    shown = _choose_shown_runs(sweep, groups)
    responses, spectra = {}, {}
    for name, record in shown:
        folder = sweep.folder / record.folder.name  # --keep copies neither of the two
        spectra[name] = read_spectra(folder)
        responses |= read_responses(folder, name)
    num_done = sum(record.results is not None for record in runs)
    notes = [*list_recipe_notes(sweep), *list_notes(sweep, groups)]
    notes.append("Spectra, responses and conditions are those of the first run of each row.")
    return Page(
        title=f"Table: {sweep.name}",
        about=f"{num_done} of {len(runs)} runs that are known so far have finished.",
        tables=_make_blocks(sweep, groups),
        folded=[(f"Every run ({len(runs)})", tabulate_runs(runs))],
        charts=_make_charts(sweep, groups, spectra),
        generations=pack_responses(responses) if responses else None,
        conditions=tabulate_conditions([record for _, record in shown]),
        notes=notes,
        commands=_list_commands(sweep, path),
        recipes=_list_recipes(sweep, shown),
    )


def _make_blocks(sweep: Sweep, groups: Sequence[Group]) -> list[tuple[str, Table]]:
    """Return the blocks of the table with their headings."""
    blocks = []
    for heading, (titles, *rows) in build_blocks(sweep, groups).items():
        cells = [[Cell(entry.text, entry.value, entry.is_best) for entry in row] for row in rows]
        blocks.append((heading, Table("", [entry.text for entry in titles], cells)))
    return blocks


def _list_runs(sweep: Sweep) -> list[RunRecord]:
    """Read every run of the sweep that is known so far, in its order."""
    return [_read_run(sweep, run, run.name) for run in sweep.list_all_runs()]


def _read_run(sweep: Sweep, run: Run, name: str) -> RunRecord:
    return make_record(sweep.find_folder(run), name, run.recipe, dump_recipe(run.recipe))


def _choose_shown_runs(sweep: Sweep, groups: Sequence[Group]) -> list[ShownRun]:
    """Return the first finished run of every row and value, at the first of its learning rates."""
    shown: dict[str, ShownRun] = {}
    runs = {run.name: run for run in sweep.list_all_runs()}
    for group in groups:  # those at own learning rates come first
        name = group.name
        if name in shown or not group.results:
            continue
        run = runs[group.folders[min(group.results)].name]
        shown[name] = ShownRun(name, _read_run(sweep, run, name))
    return list(shown.values())


def _make_charts(sweep: Sweep, groups: Sequence[Group], spectra: dict[str, Spectra]) -> list[Chart]:
    """Return every chart that the finished runs allow."""
    finished = [group for group in groups if group.results]
    charts = [_chart_rates(sweep), _chart_scores(sweep, finished)]
    charts += [_chart_curves(sweep, finished, key) for key in METRIC_LABELS]
    return [chart for chart in charts if chart is not None] + chart_layers(spectra)


def _chart_rates(sweep: Sweep) -> Chart | None:
    """Chart the held-out loss by learning rate, a figure for each value that varies.

    Returns:
        None where no rate is chosen, or no run has a loss yet.
    """
    figures = {}
    for value, curves in group_by_value(collect_rate_curves(sweep)).items():
        figure = _draw_rates(curves)
        if figure.lines:
            figures[value] = figure
    if not figures:
        return None
    about = (
        f"Held-out loss at each learning rate, seed {sweep.table.learning_rates.seed}; the least "
        "decides. A rate at which the run diverged, or has not ended, has no point."
    )
    return Chart("rates", "Held-out loss by learning rate", about, figures)


def _draw_rates(curves: Sequence[RateCurve]) -> Figure:
    """Draw the held-out loss by learning rate, a line for each row."""
    figure = make_figure("learning rate", "held-out loss", log_x=True)
    numbers, rates = {}, set()
    for curve in curves:
        label, known = curve.cell.label, curve.list_finite()
        if not known:
            continue
        add_line(figure, label, list(known), list(known.values()), max_markers=0)
        rates |= known.keys()
        fresh = curve.fresh.get(curve.own)
        mean = None if fresh is None or fresh.mean is None else fresh.mean.mean
        numbers[label] = (curve.own, known.get(curve.own), mean)
    set_ticks(figure, sorted(rates))
    list_numbers(
        figure, numbers, ["own learning rate", "its held-out loss", "mean over fresh seeds"]
    )
    return figure


def _chart_scores(sweep: Sweep, groups: Sequence[Group]) -> Chart | None:
    """Chart each column that is compared, with its intervals: by row, or by what varies."""
    figures = {}
    draw = _draw_by_value if draws_by_value(sweep) else _draw_by_row
    for column in list_columns(sweep, groups):
        if column.better is None or joins_tasks(sweep, column):
            continue
        if any(group.get_values(column) for group in groups):
            figures[column.title] = draw(sweep, groups, column)
    if not figures:
        return None
    about = "Means over the seeds with their 95 % intervals (Student's t)."
    return Chart("scores", "Scores", about, figures, "Number")


def _draw_by_row(sweep: Sweep, groups: Sequence[Group], column: Column) -> Figure:
    """Draw a row of points for each row of the table, a line for each kind of learning rate."""
    rows = collect_points(groups, column)
    figure = make_rows_figure(column.title, len(rows))
    if column.limits is not None:
        least, greatest = get_axis_limits(column)
        figure.layout["xaxis"] |= {"minallowed": least, "maxallowed": greatest}
    for kind in dict.fromkeys(kind for points in rows.values() for kind in points):
        intervals = {}
        for label, points in rows.items():
            if kind in points:
                mean, half = points[kind]
                intervals[label] = (
                    (None, mean, None) if half is None else (mean - half, mean, mean + half)
                )
        add_intervals(figure, kind, intervals)
    return figure


def _draw_by_value(sweep: Sweep, groups: Sequence[Group], column: Column) -> Figure:
    """Draw a line for each row of the table, by the value that varies."""
    lines = collect_lines([group for group in groups if group.rate == groups[0].rate], column)
    values, is_log = order_values(lines)
    figure = make_figure(sweep.table.vary.fields[0], column.title, log_x=is_log)
    if is_log:
        set_ticks(figure, values)
    else:
        figure.layout["xaxis"]["type"] = "category"
    for label, points in lines.items():
        places = [value for value in values if value in points]
        x = places if is_log else list(map(str, places))
        means = [points[value].mean for value in places]
        add_line(figure, label, x, means, half=[points[value].half for value in places])
    return figure


def _chart_curves(sweep: Sweep, groups: Sequence[Group], key: str) -> Chart | None:
    """Chart a metric by step, a line for each row; None where no run has finished."""
    figures = {}
    for rate in dict.fromkeys(group.rate for group in groups):
        members = [group for group in groups if group.rate == rate]
        for title, curves in collect_curves(sweep, members, key, rate).items():
            figure = make_figure("optimiser step", METRIC_LABELS[key], log_y=key == "grad_norm")
            for label, runs in curves.items():
                steps, mean, low, high = smooth_runs(runs)
                add_line(
                    figure, label, steps.tolist(), mean.tolist(), (low.tolist(), high.tolist())
                )
            choice = title if title == RATES[rate] else f"{title}, {RATES[rate]}"
            figures[choice] = figure
    if not figures:
        return None
    about = (
        f"{METRIC_LABELS[key].capitalize()}: mean over the seeds that reach a step and over {WINDOW} "
        "steps; their range is shaded."
    )
    return Chart(key.replace("_", "-"), TITLES[key], about, figures)


def _list_commands(sweep: Sweep, path: Path) -> dict[str, str]:
    """Return the commands that make the missing runs, and this page again."""
    again = ["python", "launch/report.py", *sweep.options, "--html", str(path)]
    return {
        "The missing runs": shlex.join(["python", "launch/sweep.py", *sweep.options]),
        "This page again": shlex.join(again),
    }


def _list_recipes(sweep: Sweep, shown: Sequence[ShownRun]) -> dict[str, str]:
    """Return the table with all its fields, and the recipe of the first run of every row."""
    table = yaml.safe_dump(sweep.table.model_dump(mode="json"), sort_keys=False)
    recipes = {f"Recipe of {name}, first run": record.recipe_text for name, record in shown}
    return {f"The table, {sweep.name}": table} | recipes
