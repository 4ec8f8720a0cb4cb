"""A table's groups as Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

from launch.run.plots import Point
from launch.sweeps.summary import Column, Group, best, mean_interval, published, table_columns
from launch.sweeps.table import Rate, Sweep, columns

RATES: dict[Rate, str] = {
    "recipe": "at the recipe's learning rate",
    "own": "each at its own learning rate",
    "common": "all at one learning rate",
}
TEST = (
    "Mean over seeds, and half of its 95 % interval (Student's t). Bold: best of its block, where a two-sided test "
    "against the next best gives p < 0.05 (paired t-test over common seeds, else Welch's), without correction for the "
    "number of columns. An empty cell has not been run."
)
SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
} | {character: f"\\{character}" for character in "&%$#_{}"}


class Cell(NamedTuple):
    """A cell's text, and whether it is the best of its block."""

    text: str
    bold: bool = False


def blocks(sweep: Sweep, groups: Sequence[Group]) -> dict[str, list[list[Cell]]]:
    """Heading -> rows of cells, the first being the titles; a block for each rate and varied value."""
    shown = table_columns(sweep, groups)
    suites = columns(sweep.table)
    numbers = published(groups, suites)
    with_published = [suite for suite in suites if any(suite in of for of in numbers.values())]
    head = ["row", "learning rate", "seeds", *(column.title for column in shown)]
    head += [f"{suite} published (%)" for suite in with_published]
    found: dict[str, list[list[Cell]]] = {}
    for heading, members in _members(sweep, groups).items():
        winners = [best([groups[i] for i in members], column) for column in shown]
        rows = [[Cell(title) for title in head]]
        for place, i in enumerate(members):
            group, known = groups[i], numbers.get(i, {})
            row = [Cell(group.label), Cell(_rate(group)), Cell(_seeds(group))]
            for column, winner in zip(shown, winners, strict=True):
                point = mean_interval(list(group.numbers(column).values()))
                row.append(Cell(_text(point, column), winner == place))
            row += [
                Cell(f"{known[suite]['value']:.2f}" if suite in known else "")
                for suite in with_published
            ]
            rows.append(row)
        found[heading] = rows
    return found


def _members(sweep: Sweep, groups: Sequence[Group]) -> dict[str, list[int]]:
    """Heading -> indices of its groups."""
    vary = sweep.table.vary
    found: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        rate = RATES[group.rate]
        heading = f"{vary.fields[0]} = {group.value}, {rate}" if vary else rate
        found.setdefault(heading[0].upper() + heading[1:], []).append(i)
    return found


def _rate(group: Group) -> str:
    return f"{group.lr:g}{' (end of its grid)' if group.at_edge else ''}"


def _seeds(group: Group) -> str:
    """How many are in, of how many."""
    count = (
        f"{len(group.results)}"
        if len(group.results) == group.wanted
        else f"{len(group.results)} of {group.wanted}"
    )
    return count + (f", {group.diverged} diverged" if group.diverged else "")


def _text(point: Point | None, column: Column) -> str:
    if point is None:
        return ""
    if point.half is None or column.better is None:
        return f"{point.mean:{column.form}}"
    return f"{point.mean:{column.form}} ± {point.half:{column.form}}"


def notes(sweep: Sweep, groups: Sequence[Group]) -> list[str]:
    """What is to be said under the table: the test, revisions, where published numbers are from."""
    results = [of for group in groups for of in group.results.values()]
    lines = [TEST]
    rates = sweep.table.learning_rates
    if rates:
        lines.append(
            f"A row's own learning rate has the least held-out loss of its grid on seed {rates.seed}; no score counts."
        )
    sizes = sorted(
        {f"{suite}: n = {score['n']}" for of in results for suite, score in of["scores"].items()}
    )
    revisions = sorted({of["conditions"]["git_revision"] or "no revision" for of in results})
    machines = sorted(
        {f"{of['conditions']['world_size']} x {of['conditions']['device']}" for of in results}
    )
    if results:
        lines.append(f"{'; '.join([*sizes, *machines])}; revision {', '.join(revisions)}.")
    sources = {
        of["source"]
        for suites in published(groups, columns(sweep.table)).values()
        for of in suites.values()
    }
    if sources:
        lines.append(f"Published: {'; '.join(sorted(sources))}.")
    return lines


def markdown(sweep: Sweep, groups: Sequence[Group]) -> str:
    """The table in Markdown, block after block."""

    def text(cell: Cell) -> str:
        shown = cell.text.replace("|", "\\|")
        return f"**{shown}**" if cell.bold else shown

    lines = [f"# {sweep.name}", ""]
    for heading, (head, *rows) in blocks(sweep, groups).items():
        lines += [f"{heading}:", ""]
        for cells in (head, [Cell("---")] * len(head), *rows):
            lines.append(f"| {' | '.join(map(text, cells))} |")
        lines.append("")
    return "\n".join([*lines, *notes(sweep, groups)]) + "\n"


def latex(sweep: Sweep, groups: Sequence[Group]) -> str:
    r"""The table for \input, with the booktabs package: a heading over each block, the notes below."""

    def text(cell: Cell) -> str:
        return f"\\textbf{{{escape(cell.text)}}}" if cell.bold else escape(cell.text)

    lines = ["% needs \\usepackage{booktabs}; \\resizebox, of graphicx, makes a wide tabular fit"]
    for heading, (head, *rows) in blocks(sweep, groups).items():
        lines += [
            f"\\noindent {escape(heading)}:\\\\*",
            f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            "\\toprule",
        ]
        lines += [f"{' & '.join(map(text, head))} \\\\", "\\midrule"]
        lines += [f"{' & '.join(map(text, row))} \\\\" for row in rows]
        lines += ["\\bottomrule", "\\end{tabular}", "\\par"]
    lines += [
        "{\\footnotesize",
        *(f"\\noindent {escape(note)}\\par" for note in notes(sweep, groups)),
        "}",
    ]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """`text` as LaTeX shows it."""
    return "".join(SPECIAL.get(character, character) for character in text).replace("±", "$\\pm$")


def to_csv(sweep: Sweep, groups: Sequence[Group]) -> str:
    """One line a group and column that has a number: unrounded mean, its interval, n, published number and source."""
    file = io.StringIO()
    out = csv.writer(file, lineterminator="\n")
    out.writerow(
        [
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
        ]
    )
    numbers = published(groups, columns(sweep.table))
    for i, group in enumerate(groups):
        for column in table_columns(sweep, groups):
            point = mean_interval(list(group.numbers(column).values()))
            if point is None:
                continue
            ends = (
                ["", ""]
                if point.half is None
                else [point.mean - point.half, point.mean + point.half]
            )
            known = numbers.get(i, {}).get(column.title.removesuffix(" (%)"), {})
            of = ["" if group.value is None else group.value, group.rate, group.lr, column.title]
            last = [len(group.numbers(column)), known.get("value", ""), known.get("source", "")]
            out.writerow([group.label, *of, point.mean, *ends, *last])
    return file.getvalue()
