"""The figures of a table: loss and gradient norm by step, scores, scores against what varies, effective ranks."""

import json
from collections.abc import Sequence
from pathlib import Path

from launch.calibration.effective_rank import RESULT
from launch.run import plots as figures
from launch.sweeps.render import RATES
from launch.sweeps.summary import Column, Group, mean_interval, table_columns
from launch.sweeps.table import Sweep, columns
from launch.training.metrics_log import read_metrics


def draw(sweep: Sweep, groups: Sequence[Group], folder: Path) -> list[Path]:
    """Every figure that the runs which are there allow, as PNG files called TABLE_<what>.png in `folder`."""
    there = [group for group in groups if group.results]
    if not there:
        return []

    def path(what: str) -> Path:
        return folder / f"{sweep.name}_{what}.png"

    made = []
    rates = list(dict.fromkeys(group.rate for group in there))
    for rate in rates:
        of = [group for group in there if group.rate == rate]
        end = f"_{rate}" if len(rates) > 1 else ""
        for key, label in figures.LABELS.items():
            made.append(
                figures.curves(
                    _panels(sweep, of, key, rate), label, path(key + end), log=key == "grad_norm"
                )
            )
    for column in table_columns(sweep, there):
        what = column.title.removesuffix(" (%)").replace(" ", "_")
        wanted = what in (*columns(sweep.table), "mean", "held-out_loss")
        if not wanted or not any(group.numbers(column) for group in there):
            continue
        if sweep.table.vary:
            made.append(
                _against(
                    sweep, [group for group in there if group.rate == rates[0]], column, path(what)
                )
            )
        else:
            made.append(figures.scores(_points(there, column), column.title, path(what)))
    ranks = {
        _line(sweep, group): figures.by_kind(json.loads(file.read_text(encoding="utf-8")))
        for group in there
        if group.rate == rates[0]
        for file in [Path(next(iter(group.folders.values()))) / "after" / RESULT]
        if file.is_file()
    }
    if ranks:
        made.append(figures.effective_rank(ranks, path("effective_rank")))
    return made


def _panels(
    sweep: Sweep, groups: Sequence[Group], key: str, rate: str
) -> dict[str, dict[str, list]]:
    """Title -> line -> that metric by step of each seed: rows are panels where something varies, else lines."""
    panels: dict[str, dict[str, list]] = {}
    for group in groups:
        title, line = (
            (group.label, str(group.value)) if sweep.table.vary else (RATES[rate], group.label)
        )
        runs = [read_metrics(Path(group.folders[seed])) for seed in group.results]
        panels.setdefault(title, {})[line] = [[step[key] for step in run] for run in runs]
    return panels


def _points(groups: Sequence[Group], column: Column) -> dict[str, dict[str, figures.Point]]:
    """Row -> whose rate -> point."""
    found: dict[str, dict[str, figures.Point]] = {}
    for group in groups:
        if point := mean_interval(list(group.numbers(column).values())):
            kind = f"{RATES[group.rate]}{f', {group.lr:g}' if group.rate == 'common' else ''}"
            found.setdefault(group.label, {})[kind] = point
    return found


def _against(sweep: Sweep, groups: Sequence[Group], column: Column, path: Path) -> Path:
    lines: dict[str, dict] = {}
    for group in groups:
        if point := mean_interval(list(group.numbers(column).values())):
            lines.setdefault(group.label, {})[group.value] = point
    return figures.against(lines, sweep.table.vary.fields[0], column.title, path)


def _line(sweep: Sweep, group: Group) -> str:
    return f"{group.label} {group.value}" if sweep.table.vary else group.label
