"""The page of some runs: finished ones, and those that are still running."""

from collections.abc import Sequence
from pathlib import Path

from launch.pages.curves import chart_layers, chart_metric, chart_scores, chart_while_training
from launch.pages.generations import pack_responses
from launch.pages.records import (
    RunRecord,
    read_responses,
    read_responses_while_training,
    read_runs,
    read_spectra,
)
from launch.pages.render import Page, write_page
from launch.pages.tables import tabulate_conditions, tabulate_differences, tabulate_runs
from launch.run.plots import METRIC_LABELS
from launch.stages.next_steps import list_next_steps, make_page_command, make_repeat_command


def write_runs_page(folders: Sequence[Path], path: Path) -> None:
    """Write the page of the runs in `folders` to `path`.

    Raises:
        UserError: a folder is not that of a run, or the page cannot be written.
    """
    write_page(make_runs_page(read_runs(folders), path), path)


def make_runs_page(records: Sequence[RunRecord], path: Path) -> Page:
    """Put the page of runs together, to be written to `path`."""
    names = ", ".join(record.name for record in records)
    tables = [("", tabulate_runs(records))]
    differences = tabulate_differences(records)
    if differences is not None:
        tables.append(("What differs", differences))
    spectra = {record.name: read_spectra(record.folder) for record in records}
    responses, further = {}, {}
    for record in records:
        responses |= read_responses(record.folder, record.name)
        further |= read_responses_while_training(record.folder, record.name)
    charts = [chart_metric(records, key) for key in METRIC_LABELS]
    charts += [chart_scores(records), chart_while_training(records)]
    return Page(
        title=f"Runs: {names}" if len(records) > 1 else f"Run: {names}",
        about=_describe(records),
        tables=tables,
        charts=[chart for chart in charts if chart is not None] + chart_layers(spectra),
        generations=pack_responses(responses, further) if responses or further else None,
        conditions=tabulate_conditions(records),
        notes=_list_notes(records),
        commands=_list_commands(records, path),
        recipes={f"recipe.yaml of {record.name}": record.recipe_text for record in records},
    )


def _describe(records: Sequence[RunRecord]) -> str:
    """Say what the page shows, and what of it is not finished."""
    unfinished = []
    for record in records:
        if record.results is not None:
            continue
        text = f"{record.name} ({record.state}"
        if record.last_step_at is not None:
            written = record.last_step_at.strftime("%Y-%m-%d %H:%M:%S UTC")
            text += f", step {record.steps[-1]['step']} written {written}"
        unfinished.append(text + ")")
    if not unfinished:
        return f"{len(records)} finished runs." if len(records) > 1 else "A finished run."
    return (
        f"Not finished when this page was made: {', '.join(unfinished)}. The same command makes it "
        "again."
    )


def _list_notes(records: Sequence[RunRecord]) -> list[str]:
    """List why runs failed."""
    return [f"{record.name}: {record.error}" for record in records if record.error]


def _list_commands(records: Sequence[RunRecord], path: Path) -> dict[str, str]:
    """Return the commands that make this page and its runs again, and what to do next."""
    folders = [record.folder for record in records]
    commands = {"This page again": make_page_command(folders, path)}
    for record in records:
        recipe, results = record.recipe, record.results
        if results is None:
            continue
        repeat = make_repeat_command(
            record.folder, recipe.engine, results.conditions.ranks_per_node
        )
        steps = list_next_steps(record.folder, recipe, results)
        commands[record.name] = "\n".join(["# again, in a new folder", repeat, ""])
        for label, command in steps.items():
            commands[record.name] += f"\n# {label}\n{command}"
    return commands
