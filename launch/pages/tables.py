"""Tables of a page: cells with the text that is read and the exact value that is sorted by."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from launch.pages.curves import WHEN, get_scores, list_benchmarks
from launch.pages.records import RunRecord
from launch.run.results import RunResults, Score, TaskScore, describe_data, describe_score

MISSING = object()  # a field that a recipe does not have


class Cell(NamedTuple):
    """A place in a table."""

    text: str
    value: float | None = None  # None: the text is sorted by
    is_best: bool = False


class Table(NamedTuple):
    """A table that can be sorted by each of its columns."""

    caption: str
    titles: list[str]
    rows: list[list[Cell]]


def tabulate_runs(records: Sequence[RunRecord]) -> Table:
    """Make the table of runs, a row each. A number that is not known yet is left empty."""
    benchmarks = list_benchmarks(records)
    titles = ["run", "state", "method", "rank", "lr", "seed", "steps", "last loss"]
    titles += ["held-out loss before", "held-out loss after"]
    for name in benchmarks:
        titles += [f"{name} before", f"{name} after"]
    titles += ["trained parameters", "calibration (s)", "training (s)", "peak memory (GiB)"]
    rows = [_list_cells(record, benchmarks) for record in records]
    kept = [i for i in range(len(titles)) if any(row[i].text for row in rows)]
    caption = (
        "Scores of benchmarks are in percent with their 95 % Wilson interval and n (strict grader), "
        "those of development rows are fractions with their 95 % bootstrap interval."
    )
    return Table(caption, [titles[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _list_cells(record: RunRecord, benchmarks: Sequence[str]) -> list[Cell]:
    """Return the cells of a run in the order of the titles."""
    results = record.results
    cells = [
        Cell(record.name),
        Cell(record.state),
        Cell(record.label),
        make_number(record.fields.get("adapter.rank") if results is None else results.rank, "d"),
        make_number(record.fields.get("train.lr") if results is None else results.lr, "g"),
        make_number(record.fields.get("train.seed") if results is None else results.seed, "d"),
        _make_steps(record),
        make_number(_find_last_loss(record), ".4f"),
    ]
    held_out = None if results is None else results.held_out
    cells.append(make_number(held_out and held_out.before.loss, ".4f"))
    cells.append(make_number(held_out and held_out.after.loss, ".4f"))
    for name in benchmarks:
        for when in WHEN:
            cells.append(_make_score(get_scores(record, when).get(name), results))
    if results is None:
        seconds = record.steps[-1].get("seconds") if record.steps else None
        return [*cells, Cell(""), Cell(""), make_number(seconds, ".0f"), Cell("")]
    return [
        *cells,
        make_number(results.trained_parameters, ",d"),
        make_number(results.seconds.calibration, ".1f"),
        make_number(results.seconds.training, ".0f"),
        make_number(results.peak_gib, ".2f"),
    ]


def make_number(value: float | None, form: str) -> Cell:
    """Make the cell of a number, printed with a format specification; empty for None."""
    return Cell("") if value is None else Cell(f"{value:{form}}", value)


def _make_steps(record: RunRecord) -> Cell:
    """Make the cell of the steps that are done, of how many where some are not."""
    if record.results is not None:
        return make_number(record.results.steps, "d")
    if not record.steps:
        return Cell("")
    done = record.steps[-1]["step"]
    text = f"{done} of {record.num_steps}" if record.num_steps else str(done)
    return Cell(text, done)


def _find_last_loss(record: RunRecord) -> float | None:
    if record.results is not None:
        return record.results.final_loss
    return record.steps[-1]["loss"] if record.steps else None


def _make_score(score: Score | TaskScore | None, results: RunResults | None) -> Cell:
    """Make the cell of a score of the run with these results; empty without one."""
    if score is None:
        return Cell("")
    exported_step = None if results is None else results.exported_step
    return Cell(describe_score(score, exported_step), score.accuracy)


def tabulate_differences(records: Sequence[RunRecord]) -> Table | None:
    """Make the table of the recipes' fields that differ; None where there are none."""
    fields = list(dict.fromkeys(field for record in records for field in record.fields))
    rows = []
    for field in fields:
        values = [record.fields.get(field, MISSING) for record in records]
        if any(value != values[0] for value in values):
            rows.append([Cell(field), *(Cell(_format_value(value)) for value in values)])
    if not rows:
        return None
    titles = ["field", *(record.name for record in records)]
    return Table("Fields of the recipes that differ between the runs.", titles, rows)


def tabulate_conditions(records: Sequence[RunRecord]) -> Table | None:
    """Make the table of what the numbers hold for, a column for each finished run; None without."""
    columns = {
        record.name: _list_conditions(record) for record in records if record.results is not None
    }
    if not columns:
        return None
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = []
    for name in names:
        cells = [Cell(_format_value(column.get(name, MISSING))) for column in columns.values()]
        rows.append([Cell(name), *cells])
    caption = "Versions, machine, base and data of the finished runs, as results.json has them."
    return Table(caption, ["condition", *columns], rows)


def _list_conditions(record: RunRecord) -> dict[str, Any]:
    """Return what a run's numbers hold for, by name."""
    results = record.results
    conditions = {
        "recipe": results.recipe,
        "engine": results.engine,
        "dtype": results.dtype,
        "seed": results.seed,
        "calibration.seed": record.fields.get("calibration.seed"),
        **results.conditions.model_dump(),
        "base": results.base.name,
        "base revision": results.base.revision,
        "base weights (SHA-256)": results.base.weights_sha256,
        "data": results.data.path,
        "training tokens (SHA-256)": results.data.tokens_sha256,
        "rows": results.data.rows,
        "rows cut short": results.data.cut,
        "rows dropped": results.data.dropped,
        **join_lines(describe_data(results.data)),
        "largest change of a logit at step 0": results.logit_drift,
        "largest rounding of a residual": results.residual_rounding,
        **{f"{field} (auto)": value for field, value in results.decided.items()},
        **_list_steps(record),
    }
    for name, score in results.scores.items():
        if isinstance(score, TaskScore):
            continue  # the rows are those of the data, and nothing is prompted
        conditions[f"{name}: prompt, grader"] = f"{score.prompt}, {score.grader}"
        conditions[f"{name}: problems (SHA-256)"] = score.data_sha256
    return conditions


def _list_steps(record: RunRecord) -> dict[str, Any]:
    """Return which step of a run was exported, and when it ended, by name; none for other runs."""
    results, best = record.results, record.recipe.train.keep_best
    listed: dict[str, Any] = {}
    if results.planned_steps is not None:
        listed["planned steps"] = f"{results.planned_steps}, stopped by train.patience"
    if results.exported_step is not None:
        listed["exported and scored"] = f"step {results.exported_step}, the best by {best}"
    return listed


def join_lines(described: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return pairs by their first element; what is said of one thing stands together."""
    joined: dict[str, str] = {}
    for subject, line in described:
        joined[subject] = f"{joined[subject]}; {line}" if subject in joined else line
    return joined


def _format_value(value: Any) -> str:
    """Return a value of a recipe or a condition as text; empty where there is none."""
    if value is MISSING or value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {inner}" for key, inner in value.items()) or "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)
