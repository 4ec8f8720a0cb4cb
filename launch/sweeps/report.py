"""Report a sweep: its table on the screen and in files, and its figures."""

import os
from collections.abc import Sequence
from pathlib import Path

from launch.runtime.files import write_text
from launch.sweeps.figures import draw_figures
from launch.sweeps.render import (
    render_csv,
    render_latex,
    render_markdown,
    render_rates_csv,
    render_tests_csv,
)
from launch.sweeps.summary import Group, collect_groups
from launch.sweeps.table import Sweep


def report_sweep(sweep: Sweep, texts: Path | None, figures: Path | None) -> None:
    """Print the table of a sweep, with what is there so far.

    Args:
        texts: folder into which the table is also written as Markdown, LaTeX and CSV.
        figures: folder into which the figures are drawn. The Markdown file shows them.

    Raises:
        UserError: runs that should have the same inputs were made with different ones.
    """
    groups = collect_groups(sweep)
    print(render_markdown(sweep, groups))
    if texts:  # before the figures, so that a figure that fails does not take them along
        texts.mkdir(parents=True, exist_ok=True)
        _write_texts(sweep, groups, texts)
    if figures:
        figures.mkdir(parents=True, exist_ok=True)
        paths = draw_figures(sweep, groups, figures)
        print("figures: " + " ".join(map(str, paths)))
        if texts:
            page = render_markdown(sweep, groups, _link_figures(sweep, paths, texts))
            write_text(texts / f"{sweep.name}.md", page)


def _write_texts(sweep: Sweep, groups: Sequence[Group], folder: Path) -> None:
    """Write the table as Markdown, without figures, as LaTeX and as CSV."""
    write_text(folder / f"{sweep.name}.md", render_markdown(sweep, groups))
    write_text(folder / f"{sweep.name}.tex", render_latex(sweep, groups))
    write_text(folder / f"{sweep.name}.csv", render_csv(sweep, groups))
    write_text(folder / f"{sweep.name}_tests.csv", render_tests_csv(sweep, groups))
    if sweep.table.learning_rates:
        write_text(folder / f"{sweep.name}_rates.csv", render_rates_csv(sweep))


def _link_figures(sweep: Sweep, paths: Sequence[Path], texts: Path) -> dict[str, str]:
    """Return path from the folder `texts` -> what the figure shows."""
    links = {}
    for path in paths:
        what = path.stem.removeprefix(f"{sweep.name}_").replace("_", " ")
        links[Path(os.path.relpath(path, texts)).as_posix()] = what
    return links
