"""Charts of runs: metrics by step, scores with their intervals, spectra by layer."""

import math
from collections.abc import Mapping, Sequence

from launch.calibration.report import LAYER_LABELS, group_by_kind, list_layers
from launch.pages.charts import (
    MAX_POINTS,
    Chart,
    Figure,
    add_intervals,
    add_line,
    add_ordered_line,
    add_points,
    average_points,
    list_numbers,
    make_figure,
    make_rows_figure,
    pick_ordered,
)
from launch.pages.records import RunRecord
from launch.run.best import find_best, list_score_names, list_scored_steps
from launch.run.plots import METRIC_LABELS
from launch.run.results import Score, TaskScore

Spectra = Mapping[str, dict]
"""Module -> its figures in a calibration's spectrum.json."""

WHEN = ("before training", "after training")
TITLES = {"loss": "Loss by step", "grad_norm": "Gradient norm by step"}


def chart_metric(records: Sequence[RunRecord], key: str) -> Chart | None:
    """Chart a field of metrics.jsonl by step, a line for each run; None where no run has a step.

    The loss has held-out losses beside it.
    """
    figure = make_figure("optimiser step", METRIC_LABELS[key], log_y=key == "grad_norm")
    numbers, longest = {}, 1
    for record in records:
        values = [step.get(key) for step in record.steps]
        if not values:
            continue
        size = math.ceil(len(values) / MAX_POINTS)
        longest = max(longest, size)
        steps = [step["step"] for step in record.steps][::size]
        add_line(figure, record.name, steps, average_points(values, size))
        known = [value for value in values if value is not None and math.isfinite(value)]
        numbers[record.name] = (values[0], min(known, default=None), values[-1])
    if not figure.lines:
        return None
    list_numbers(figure, numbers, ["first step", "least", "last step"])
    about = f"{METRIC_LABELS[key].capitalize()}, a line for each run."
    if longest > 1:
        about += f" Long runs: every point is the mean of up to {longest} steps."
    if key == "loss" and _add_held_out(figure, records):
        about += " Held-out rows: before training, while training if scored, and after."
    return Chart(key.replace("_", "-"), TITLES[key], about, {"": figure})


def _add_held_out(figure: Figure, records: Sequence[RunRecord]) -> bool:
    """Add the held-out losses of runs; return whether there are any."""
    found = False
    for record in records:
        losses = _list_held_out(record)
        if losses:
            found = True
            label = f"{record.name}, held-out"
            add = add_points if len(losses) < 3 else add_line
            add(figure, label, list(losses), list(losses.values()))
    return found


def _list_held_out(record: RunRecord) -> dict[int, float]:
    """Return step -> held-out loss of a run: before training (0), while training, and after."""
    scored = list_scored_steps(record.steps, "held_out")
    losses = {one.step: one.value for one in scored}
    results = record.results
    if results is None or results.held_out is None:
        return losses
    ends = {0: results.held_out.before.loss}
    ends[results.exported_step or results.steps] = results.held_out.after.loss
    return dict(sorted((ends | losses).items()))


def chart_while_training(records: Sequence[RunRecord]) -> Chart | None:
    """Chart the scores while training by step, a choice for each; None where there are none.

    The held-out loss is left out: it is beside the loss.
    """
    by_name = {record.name: record for record in records}
    names = dict.fromkeys(name for record in records for name in list_score_names(record.steps))
    figures: dict[str, Figure] = {}
    for name in names:
        if name == "held_out":
            continue
        scored = {label: list_scored_steps(one.steps, name) for label, one in by_name.items()}
        scored = {label: steps for label, steps in scored.items() if steps}
        metric = next(iter(scored.values()))[0].metric
        figure = make_figure("optimiser step", f"{name}: {metric}")
        numbers = {}
        for label, steps in scored.items():
            values = [one.value for one in steps]
            add_line(figure, label, [one.step for one in steps], values)
            best = find_best(by_name[label].steps, name)
            numbers[label] = (values[0], best and best.value, values[-1])
        list_numbers(figure, numbers, ["first", "best", "last"])
        figures[name] = figure
    if not figures:
        return None
    about = "Scores of the model while it trained, a line for each run."
    return Chart("while-training", "Scores while training", about, figures, "Score")


def chart_scores(records: Sequence[RunRecord]) -> Chart | None:
    """Chart scores with their 95 % intervals, a choice for each benchmark or development rows.

    Of development rows the last epoch's first metric; a score without an interval is left out.
    """
    figures: dict[str, Figure] = {}
    for benchmark in list_benchmarks(records):
        figure = make_rows_figure(
            f"{_name_metric(records, benchmark)} (%), with 95 % interval", len(records)
        )
        for when in WHEN:
            rows = {}
            for record in records:
                score = get_scores(record, when).get(benchmark)
                if score is not None and score.interval is not None:
                    low, high = score.interval
                    rows[record.name] = (100 * low, 100 * score.accuracy, 100 * high)
            if rows:
                add_intervals(figure, when, rows)
        if figure.lines:
            figures[benchmark] = figure
    if not figures:
        return None
    about = (
        "Each run's score with its 95 % interval: of a benchmark the strict grader's accuracy, of "
        "development rows the last epoch's metric."
    )
    return Chart("scores", "Scores", about, figures, "Benchmark")


def _name_metric(records: Sequence[RunRecord], benchmark: str) -> str:
    """Return what the scores of `benchmark` are: accuracy, or a metric of development rows."""
    for record in records:
        score = get_scores(record, WHEN[1]).get(benchmark)
        if isinstance(score, TaskScore):
            return f"{score.metric}, last epoch"
    return "accuracy"


def list_benchmarks(records: Sequence[RunRecord]) -> list[str]:
    """List the benchmarks, or development rows, that at least one run was scored on."""
    names = set()
    for record in records:
        if record.results is not None:
            names |= {*record.results.baseline, *record.results.scores}
    return sorted(names)


def get_scores(record: RunRecord, when: str) -> dict[str, Score | TaskScore]:
    """Return the scores of a run, at one of WHEN; none until it has finished."""
    if record.results is None:
        return {}
    return record.results.baseline if when == WHEN[0] else record.results.scores


def chart_layers(runs: Mapping[str, Spectra]) -> list[Chart]:
    """Chart what calibrations saw, by the run's name: figures of modules by layer, eigenvalues."""
    runs = {name: spectra for name, spectra in runs.items() if spectra}
    charts = []
    for key, label in LAYER_LABELS.items():
        figures = {}
        for name, modules in runs.items():
            figure = _draw_layers(modules, key, label)
            if figure is not None:
                figures[name] = figure
        if figures:
            title = f"{label[0].upper()}{label[1:]} by layer"
            about = f"{title}, a line for each kind of module, as the calibration saw it."
            charts.append(Chart(key.replace("_", "-"), title, about, figures, "Run"))
    spectra = {}
    for run, modules in runs.items():
        for kind, names in group_by_kind(modules).items():
            choice = f"{run}: {kind}" if len(runs) > 1 else kind
            spectra[choice] = _draw_spectra({name: modules[name] for name in names})
    if spectra:
        about = (
            "Eigenvalues of the outputs' second moment over their trace, by index: "
            "a line for each layer, from dark (the first) to light."
        )
        charts.append(Chart("spectra", "Spectra by layer", about, spectra, "Modules"))
    return charts


def _draw_layers(modules: Spectra, key: str, label: str) -> Figure | None:
    """Draw a figure of every module by layer; None where the calibration has none."""
    figure = make_figure("layer", label)
    figure.layout["xaxis"]["dtick"] = 1 if len(modules) <= 100 else None
    numbers = {}
    for kind, names in group_by_kind(modules).items():
        values = [modules[name].get(key) for name in names]
        known = [value for value in values if value is not None]
        if known:
            add_line(figure, kind, list_layers(names), values)
            numbers[kind] = (values[0], min(known), max(known), values[-1])
    list_numbers(figure, numbers, ["first layer", "least", "greatest", "last layer"])
    return figure if figure.lines else None


def _draw_spectra(modules: Spectra) -> Figure:
    """Draw the eigenvalues of the modules of one kind, a line for each layer."""
    figure = make_figure("index, ascending", "share of trace", log_y=True, hover="closest")
    figure.layout["yaxis"]["dtick"] = 1  # every decade: spectra span many
    layers = list_layers(list(modules))
    for place, (layer, module) in enumerate(zip(layers, modules.values(), strict=True)):
        curve, trace = module["curve"], module["trace"]
        # The axis is logarithmic: zero eigenvalues are gaps.
        shares = [value / trace if trace and value > 0 else None for value in curve["value"]]
        colour = pick_ordered(place, len(modules))
        add_ordered_line(figure, f"layer {layer}", curve["index"], shares, colour)
    return figure
