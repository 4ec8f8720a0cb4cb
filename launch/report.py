"""Print finished runs as a Markdown table, one row each, and draw their curves; or report a sweep.

--table reports a sweep: its table and its figures. It takes the options of the launch/sweep.py that
made the runs. What has not been run yet is left empty. --html makes one page of either, which needs
no network: runs that are not finished are shown as far as they are."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: imports are to be looked up from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch import cli
from launch.run.metrics import read_metrics
from launch.run.plots import plot_runs
from launch.run.results import (
    describe_data,
    find_run_results,
    read_run_results,
    render_runs,
)
from launch.runtime.entry import run_command
from launch.runtime.errors import UserError

EXAMPLES = """\
  python launch/report.py runs/quickstart runs/quickstart-lora
  python launch/report.py runs/*/ --figures runs
  python launch/report.py runs/quickstart runs/quickstart-lora --html runs/quickstart.html
  python launch/report.py --table miniature --write docs --figures docs --html docs/miniature.html"""


def main() -> None:
    """Report the runs or the table that the command line names."""
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders")
    cli.add_table_options(parser)
    parser.add_argument(
        "--write",
        type=Path,
        metavar="DIR",
        help="also write TABLE.md, TABLE.tex and TABLE.csv there",
    )
    parser.add_argument("--figures", type=Path, metavar="DIR", help="also draw the figures there")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="also write everything to one page"
    )
    arguments = parser.parse_args()
    if bool(arguments.runs) == bool(arguments.table):
        raise UserError("give either run folders or --table")
    if arguments.html:
        from launch.pages.render import check_path

        check_path(arguments.html)  # before anything is written
    if arguments.table:
        report_table(arguments)
    elif arguments.write or arguments.set or arguments.output or arguments.keep:
        raise UserError("--write, --set, --output and --keep go with --table")
    else:
        report_runs(arguments.runs, arguments.figures, arguments.html)


def report_table(arguments: argparse.Namespace) -> None:
    """Print a sweep's table; write it, its figures and its page where the options say."""
    from launch.sweeps.report import report_sweep  # with SciPy and torch it takes seconds
    from launch.sweeps.table import read_table

    sweep = read_table(arguments.table, arguments.set, arguments.output, arguments.keep)
    report_sweep(sweep, arguments.write, arguments.figures)
    if arguments.html:
        from launch.pages.sweep import write_sweep_page

        write_sweep_page(sweep, arguments.html)
        print(f"page: {arguments.html}")


def report_runs(folders: Sequence[Path], figures: Path | None, page: Path | None) -> None:
    """Print a table of finished runs; draw their curves, and write their page.

    Args:
        figures: folder for the curves; None for none.
        page: file; None for none. With a page, runs that have not finished are left out of the
            table, which the page shows as far as they are.
    """
    finished = folders
    if page is not None:
        finished = [folder for folder in folders if find_run_results(folder) is not None]
    if finished:
        print(render_runs(finished))
    for folder in finished:
        for subject, line in describe_data(read_run_results(folder).data):
            print(f"{folder.resolve().name}, {subject}: {line}")
    if page is not None:
        from launch.pages.runs import write_runs_page

        write_runs_page(folders, page)
        print(f"page: {page}")
    if figures is None or not finished:
        return
    figures.mkdir(parents=True, exist_ok=True)
    steps = {}
    for folder in finished:
        method = read_run_results(folder).label
        label = f"{folder.resolve().name} ({method})"
        if label in steps:  # folders of the same name in different places
            label = f"{folder} ({method})"
        steps[label] = read_metrics(folder)
    paths = plot_runs(steps, figures)
    print("plots: " + " ".join(map(str, paths)))


if __name__ == "__main__":
    run_command(main)
