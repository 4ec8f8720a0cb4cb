"""Render a table's groups as Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

from launch.sweeps.summary import (
    Column,
    Group,
    Point,
    Published,
    find_best,
    find_published,
    list_columns,
)
from launch.sweeps.table import Rate, Sweep, list_benchmarks

RATES: dict[Rate, str] = {
    "recipe": "at the recipe's learning rate",
    "own": "each at its own learning rate",
    "common": "all at one learning rate",
}
TEST_NOTE = (
    "Mean over seeds, and half of its 95 % interval (Student's t). Bold: best of its block, where "
    "a two-sided test against the next best gives p < 0.05 (paired t-test over common seeds, else "
    "Welch's), without correction for the number of columns. An empty cell has not been run."
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


class Entry(NamedTuple):
    """The text in one place of a rendered table."""

    text: str
    is_best: bool = False  # of its column in its block
    value: float | None = None  # the number in the text, not rounded


def build_blocks(sweep: Sweep, groups: Sequence[Group]) -> dict[str, list[list[Entry]]]:
    """Return the blocks of the table, one for each learning rate and varied value.

    Returns:
        Heading -> rows of entries. The first row holds the titles.
    """
    columns = list_columns(sweep, groups)
    published = find_published(groups, list_benchmarks(sweep.table))
    benchmarks = []  # those that have a published score, each a column
    for name in list_benchmarks(sweep.table):
        if any(name in scores for scores in published.values()):
            benchmarks.append(name)
    titles = ["row", "learning rate", "seeds", *(column.title for column in columns)]
    titles += [f"{name} published (%)" for name in benchmarks]
    # A mean is compared with those of its own block only.
    blocks = {}
    for heading, members in _group_by_heading(sweep, groups).items():
        best = [find_best([groups[i] for i in members], column) for column in columns]
        rows = [[Entry(title) for title in titles]]
        for place, i in enumerate(members):
            are_best = [index == place for index in best]
            rows.append(_build_row(groups[i], columns, are_best, benchmarks, published.get(i, {})))
        blocks[heading] = rows
    return blocks


def _build_row(
    group: Group,
    columns: Sequence[Column],
    are_best: Sequence[bool],
    benchmarks: Sequence[str],
    published: dict[str, Published],
) -> list[Entry]:
    """Return a group's row of the table: its `columns`, then published scores of `benchmarks`."""
    at_edge = " (end of its grid)" if group.at_edge else ""
    row = [Entry(group.label), Entry(f"{group.lr:g}{at_edge}", value=group.lr)]
    row.append(Entry(_format_seeds(group), value=len(group.results)))
    for column, is_best in zip(columns, are_best, strict=True):
        point = group.estimate_column(column)
        row.append(Entry(_format_point(point, column), is_best, point and point.mean))
    for name in benchmarks:
        value = published[name].value if name in published else None
        row.append(Entry("" if value is None else f"{value:.2f}", value=value))
    return row


def _group_by_heading(sweep: Sweep, groups: Sequence[Group]) -> dict[str, list[int]]:
    """Return the indices of the groups of each block, by its heading."""
    vary = sweep.table.vary
    found: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        rate = RATES[group.rate]
        heading = f"{vary.fields[0]} = {group.value}, {rate}" if vary else rate
        found.setdefault(heading[0].upper() + heading[1:], []).append(i)
    return found


def _format_seeds(group: Group) -> str:
    """Return how many seeds have finished, of how many where some have not."""
    text = str(len(group.results))
    if len(group.results) != group.num_wanted:
        text += f" of {group.num_wanted}"
    if group.num_diverged:
        text += f", {group.num_diverged} diverged"
    return text


def _format_point(point: Point | None, column: Column) -> str:
    """Return a mean, with its interval where the column's numbers are compared."""
    if point is None:
        return ""
    if point.half is None or column.better is None:
        return f"{point.mean:{column.form}}"
    return f"{point.mean:{column.form}} ± {point.half:{column.form}}"


def list_notes(sweep: Sweep, groups: Sequence[Group]) -> list[str]:
    """List the notes under the table: the test, conditions, sources of published numbers."""
    notes = [TEST_NOTE]
    rates = sweep.table.learning_rates
    if rates:
        notes.append(
            "A row's own learning rate has the least held-out loss of its grid on seed "
            f"{rates.seed}; no score counts."
        )
    sizes, machines, revisions = set(), set(), set()
    for group in groups:
        for results in group.results.values():
            sizes |= {f"{name}: n = {score.n}" for name, score in results.scores.items()}
            conditions = results.conditions
            machines.add(f"{conditions.world_size} x {conditions.device}")
            revisions.add(conditions.git_revision or "no revision")
    if revisions:  # at least one run has finished
        held_for = "; ".join([*sorted(sizes), *sorted(machines)])
        notes.append(f"{held_for}; revision {', '.join(sorted(revisions))}.")
    sources = set()
    for scores in find_published(groups, list_benchmarks(sweep.table)).values():
        sources |= {score.source for score in scores.values()}
    if sources:
        notes.append(f"Published: {'; '.join(sorted(sources))}.")
    return notes


def render_markdown(sweep: Sweep, groups: Sequence[Group]) -> str:
    """Render the table in Markdown, block after block."""

    def render_entry(entry: Entry) -> str:
        text = entry.text.replace("|", "\\|")
        return f"**{text}**" if entry.is_best else text

    lines = [f"# {sweep.name}", ""]
    for heading, (titles, *rows) in build_blocks(sweep, groups).items():
        lines += [f"{heading}:", ""]
        for row in (titles, [Entry("---")] * len(titles), *rows):
            lines.append(f"| {' | '.join(map(render_entry, row))} |")
        lines.append("")
    return "\n".join([*lines, *list_notes(sweep, groups)]) + "\n"


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
    lines += [f"\\noindent {escape_latex(note)}\\par" for note in list_notes(sweep, groups)]
    lines.append("}")
    return "\n".join(lines) + "\n"


def escape_latex(text: str) -> str:
    """Return `text` with the characters that are special to LaTeX escaped."""
    return "".join(LATEX_SPECIAL.get(character, character) for character in text)


def render_csv(sweep: Sweep, groups: Sequence[Group]) -> str:
    """Render a line for each group and column that has a number, none of them rounded."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_HEAD)
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
            score = published.get(i, {}).get(benchmark, ("", ""))
            value = "" if group.value is None else group.value
            line = [group.label, value, group.rate, group.lr, column.title, point.mean, low, high]
            writer.writerow([*line, len(group.get_values(column)), *score])
    return file.getvalue()
