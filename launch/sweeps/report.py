"""Report a sweep: its table on the screen and in files, and its figures."""

from pathlib import Path

from launch.runtime.files import write_text
from launch.sweeps.figures import draw_figures
from launch.sweeps.render import render_csv, render_latex, render_markdown
from launch.sweeps.summary import collect_groups
from launch.sweeps.table import Sweep


def report_sweep(sweep: Sweep, texts: Path | None, figures: Path | None) -> None:
    """Print the table of a sweep, with what is there so far.

    Args:
        texts: folder into which the table is also written as Markdown, LaTeX and CSV.
        figures: folder into which the figures are drawn.

    Raises:
        UserError: runs that should have the same inputs were made with different ones.
    """
    groups = collect_groups(sweep)
    table = render_markdown(sweep, groups)
    print(table)
    if texts:
        texts.mkdir(parents=True, exist_ok=True)
        write_text(texts / f"{sweep.name}.md", table)
        write_text(texts / f"{sweep.name}.tex", render_latex(sweep, groups))
        write_text(texts / f"{sweep.name}.csv", render_csv(sweep, groups))
    if figures:
        figures.mkdir(parents=True, exist_ok=True)
        paths = draw_figures(sweep, groups, figures)
        print("figures: " + " ".join(map(str, paths)))
