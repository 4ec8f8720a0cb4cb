"""Render a table's groups as Markdown, LaTeX and CSV."""

import csv
import io
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from launch.run.results import (
    RunResults,
    TaskScore,
    describe_copies,
    describe_rows,
    find_run_results,
)
from launch.sweeps.blocks import Entry, build_blocks, count_tests, list_row_blocks
from launch.sweeps.curves import collect_rate_curves, list_exhausted, list_missing
from launch.sweeps.published import describe_hidden, find_published, list_shown
from launch.sweeps.rates import find_spacing, make_rate
from launch.sweeps.significance import compare_groups, describe_power
from launch.sweeps.summary import Group, list_columns
from launch.sweeps.table import LearningRates, Sweep, list_benchmarks

TEST_NOTE = (
    "Mean over seeds, and half of its 95 % interval (Student's t). Bold: best of its block, where it "
    "differs from the next best: two-sided paired t-test over common seeds, p < 0.05 after Holm's "
    "correction for all pairs of rows of the block, each column by itself. An empty cell has not "
    "been run."
)
LATEX_PACKAGES = (
    "% needs \\usepackage{booktabs}; \\resizebox, of graphicx, makes a wide tabular fit"
)
LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
} | {character: f"\\{character}" for character in "&%$#_{}"}
# Value of train.keep_best -> its loss, and what that is measured on.
CHOOSING_LOSSES = {"held_out": ("held-out loss", "rows"), "other_text": ("other-text loss", "text")}
RATES_HEAD = ("row", "value", "rate", "loss", "best", "fresh_mean", "fresh_half")
TESTS_HEAD = (
    "block",
    "column",
    "first",
    "second",
    "difference",
    "half",
    "pairs",
    "p",
    "p_holm",
)
CSV_HEAD = (
    "row",
    "value",
    "rate",
    "learning_rate",
    "column",
    "mean",
    "low",
    "high",
    "n",
    "published",
    "source",
)


def list_notes(sweep: Sweep, groups: Sequence[Group]) -> list[str]:
    """List the notes under the table: what is missing, the tests, conditions, sources."""
    notes = [TEST_NOTE]
    runs = _list_all_results(sweep)
    missing, exhausted = list_missing(sweep), list_exhausted(sweep)
    if missing:
        is_begun = runs or exhausted
        notes.append(f"Not run yet: {'. '.join(missing) if is_begun else 'everything'}.")
    if exhausted:
        names = ", ".join(cell.name for cell in exhausted)
        notes.append(f"Every learning rate diverged: {names}.")
    if any(group.num_diverged for group in groups):
        notes.append(
            "A diverged seed is in no mean, so a row with one is never bold, nor is its lead over "
            "another."
        )
    constant = [line for group in groups if (line := describe_constant(group))]
    if constant:
        notes.append(f"All predictions of the last epoch are the same: {'; '.join(constant)}.")
    tests = count_tests(sweep, groups)
    if tests is not None:
        notes.append(describe_power(*tests))
    rates = sweep.table.learning_rates
    if rates:
        notes.append(describe_choice(rates))
    for score, (loss, what) in CHOOSING_LOSSES.items():
        if any(group.recipe.train.keep_best == score for group in groups):
            notes.append(
                f"The {loss} chose the step that each run exports (train.keep_best), so it is better "
                f"than it would be on other {what}."
            )
    copies = chain.from_iterable(describe_copies(results.data) for results in runs)
    notes += dict.fromkeys(f"{line}." for _, line in copies)
    sizes: dict[tuple[str, int], str] = {}  # name of a score, rows -> what is said of the rows
    machines, revisions = set(), set()
    for results in runs:
        for name, score in results.scores.items():
            known = sizes.get((name, score.n), "")  # runs of earlier versions say less
            sizes[name, score.n] = max(known, describe_rows(score), key=len)
        conditions = results.conditions
        machines.add(f"{conditions.world_size} x {conditions.device}")
        revisions.add(conditions.git_revision or "no revision")
    if runs:
        hours = sum(results.seconds.whole for results in runs) / 3600
        described = [f"{name}: n = {rows}" for (name, _), rows in sorted(sizes.items())]
        held_for = "; ".join([*described, *sorted(machines)])
        notes.append(
            f"{held_for}; revision {', '.join(sorted(revisions))}; {len(runs)} finished runs, "
            f"{hours:.1f} hours in all."
        )
    found = find_published(groups, list_benchmarks(sweep.table))
    sources = [entry.describe() for row in found for entry in list_shown(row)]
    if sources:
        notes.append(f"Published, of the same protocol: {'; '.join(dict.fromkeys(sources))}.")
    hidden = describe_hidden(found)
    if hidden:
        notes.append(f"Published, of another protocol and not shown: {'; '.join(hidden)}.")
    return notes


def describe_constant(group: Group) -> str:
    """Name a group and its seeds whose model predicts the same for all rows; empty if none does."""
    seeds = []
    for seed, results in group.results.items():
        scores = [score for score in results.scores.values() if isinstance(score, TaskScore)]
        if any(score.last.constant == "predictions" for score in scores):
            seeds.append(str(seed))
    if not seeds:
        return ""
    where = "" if group.rate in ("recipe", "own") else f" at {group.lr:g}"
    return f"{group.name}{where}, seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"


def name_spacing(grid: Sequence[float]) -> str:
    """Say how close the rates of a grid are that may be extended."""
    spacing = find_spacing(grid)
    names = {1: "four rates a decade", 2: "two rates a decade", 4: "a rate a decade"}
    return names.get(spacing, f"rates a factor of {make_rate(spacing):.3g} apart")


def describe_choice(rates: LearningRates) -> str:
    """Say how each row's own rate was chosen."""
    text = "A row's own learning rate has the least held-out loss"
    if rates.extend:
        text += f" of a grid at {name_spacing(rates.grid)}, extended while the best was at an end"
    else:
        text += " of its grid"
    text += f", on seed {rates.seed}; no score counts. Fresh: the other seeds."
    without_dev = ("task.dev", None)  # by which the training does not change
    changed = dict(item for item in rates.set.items() if item != without_dev)
    if changed != rates.set:
        text += " The runs that choose score no development rows."
    if changed:
        values = ", ".join(f"{field}={json.dumps(value)}" for field, value in changed.items())
        text += (
            f" The runs that choose have {values}, so their losses are not comparable with those of "
            "the fresh seeds."
        )
    return text


def list_recipe_notes(sweep: Sweep) -> list[str]:
    """List the notes that the finished runs carry, each once, in their order."""
    notes = [results.note for results in _list_all_results(sweep) if results.note]
    return list(dict.fromkeys(notes))


def _list_all_results(sweep: Sweep) -> list[RunResults]:
    """Return the results of every finished run of the table, each once."""
    found = [find_run_results(sweep.find_folder(run)) for run in sweep.list_all_runs()]
    return [results for results in found if results is not None]


def render_markdown(
    sweep: Sweep, groups: Sequence[Group], figures: Mapping[str, str] | None = None
) -> str:
    """Render the table in Markdown, block after block, and the figures and the command under it.

    Args:
        figures: path, as seen from the page -> what the figure shows.
    """

    def render_entry(entry: Entry) -> str:
        text = entry.text.replace("|", "\\|")
        return f"**{text}**" if entry.is_best else text

    lines = [f"# {sweep.name}", ""]
    for note in list_recipe_notes(sweep):
        lines += [f"**Note.** {note}", ""]
    for heading, (titles, *rows) in build_blocks(sweep, groups).items():
        lines += [f"{heading}:", ""]
        for row in (titles, [Entry("---")] * len(titles), *rows):
            lines.append(f"| {' | '.join(map(render_entry, row))} |")
        lines.append("")
    lines += ["\n\n".join(list_notes(sweep, groups)), ""]
    for path, what in (figures or {}).items():
        lines += [f"![{what}]({path})", ""]
    command = shlex.join(["python", "launch/sweep.py", *sweep.options])
    lines += ["Made by:", "", "```bash", command, "```"]
    return "\n".join(lines) + "\n"


def render_latex(sweep: Sweep, groups: Sequence[Group]) -> str:
    r"""Render the table for \input, with the booktabs package: a heading above each block."""

    def render_entry(entry: Entry) -> str:
        text = escape_latex(entry.text)
        return f"\\textbf{{{text}}}" if entry.is_best else text

    lines = [LATEX_PACKAGES]
    for heading, (titles, *rows) in build_blocks(sweep, groups).items():
        alignment = f"l{'r' * (len(titles) - 1)}"
        lines += [f"\\noindent {escape_latex(heading)}:\\\\*", f"\\begin{{tabular}}{{{alignment}}}"]
        lines += ["\\toprule", f"{' & '.join(map(render_entry, titles))} \\\\", "\\midrule"]
        lines += [f"{' & '.join(map(render_entry, row))} \\\\" for row in rows]
        lines += ["\\bottomrule", "\\end{tabular}", "\\par"]
    lines.append("{\\footnotesize")
    notes = [*list_recipe_notes(sweep), *list_notes(sweep, groups)]
    lines += [f"\\noindent {escape_latex(note)}\\par" for note in notes]
    lines.append("}")
    return "\n".join(lines) + "\n"


def escape_latex(text: str) -> str:
    """Return `text` with the characters that are special to LaTeX escaped."""
    return "".join(LATEX_SPECIAL.get(character, character) for character in text)


def render_csv(sweep: Sweep, groups: Sequence[Group]) -> str:
    """Render a line for each group and column that has a number, none of them rounded."""
    lines = []
    columns = list_columns(sweep, groups)
    published = find_published(groups, list_benchmarks(sweep.table))
    for i, group in enumerate(groups):
        for column in columns:
            point = group.estimate_column(column)
            if point is None:
                continue
            low = high = ""
            if point.half is not None:
                low, high = point.mean - point.half, point.mean + point.half
            benchmark = column.title.removesuffix(" (%)")
            shown = [entry for entry in list_shown(published[i]) if benchmark in entry.scores]
            scores = "; ".join(f"{entry.scores[benchmark]:g}" for entry in shown)
            score = [scores, "; ".join(entry.source for entry in shown)]
            value = "" if group.value is None else group.value
            line = [group.label, value, group.rate, group.lr, column.title, point.mean, low, high]
            lines.append([*line, len(group.get_values(column)), *score])
    return _write_csv(CSV_HEAD, lines)


def render_rates_csv(sweep: Sweep) -> str:
    """Render a line for each learning rate of each row: its loss, and that of the fresh seeds.

    Where a mean lacks seeds, a last column says of every mean how many it has.
    """
    lines = []
    curves = collect_rate_curves(sweep)
    are_complete = [fresh.is_complete for curve in curves for fresh in curve.fresh.values()]
    head = RATES_HEAD if all(are_complete) else (*RATES_HEAD, "fresh_seeds")
    for curve in curves:
        value = "" if curve.cell.value is None else curve.cell.value
        for rate, loss in curve.losses.items():
            text = "" if loss is None else "diverged" if math.isinf(loss) else loss
            fresh = curve.fresh.get(rate)
            mean, half = ("", "") if fresh is None or fresh.mean is None else fresh.mean
            line = [curve.cell.label, value, rate, text, int(rate == curve.own), mean, half or ""]
            line.append(fresh.describe() if fresh else "")
            lines.append(line[: len(head)])
    return _write_csv(head, lines)


def render_tests_csv(sweep: Sweep, groups: Sequence[Group]) -> str:
    """Render a line for each test of two rows, in every column that is compared."""
    lines = []
    columns = [column for column in list_columns(sweep, groups) if column.better is not None]
    for heading, members in list_row_blocks(sweep, groups).items():
        for column in columns:
            for comparison in compare_groups(members, column, len(sweep.table.rows)):
                labels = [members[i].label for i in (comparison.first, comparison.second)]
                numbers = [*comparison.difference, comparison.num_pairs]
                lines.append(
                    [heading, column.title, *labels, *numbers, comparison.p, comparison.adjusted]
                )
    return _write_csv(TESTS_HEAD, lines)


def _write_csv(head: Sequence[str], lines: Iterable[Sequence]) -> str:
    """Return a CSV file's text."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
    return file.getvalue()
