"""Print finished runs as a Markdown table, one row each, and draw their curves; or report a sweep.

--table reports a sweep: its table and its figures. It takes the options of the launch/sweep.py that
made the runs. What has not been run yet is left empty."""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: imports are to be looked up from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch import cli
from launch.run.metrics import read_metrics
from launch.run.plots import plot_runs
from launch.run.results import read_run_results, runs_table
from launch.runtime.entry import run_command
from launch.runtime.errors import UserError

EXAMPLES = """\
  python launch/report.py runs/quickstart runs/quickstart-lora
  python launch/report.py runs/*/ --figures runs
  python launch/report.py --table miniature --write docs --figures docs"""


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
    arguments = parser.parse_args()
    if bool(arguments.runs) == bool(arguments.table):
        raise UserError("give either run folders or --table")
    if arguments.table:
        from launch.sweeps.report import report_sweep  # with SciPy and torch it takes seconds
        from launch.sweeps.table import read_table

        sweep = read_table(arguments.table, arguments.set, arguments.output, arguments.keep)
        report_sweep(sweep, arguments.write, arguments.figures)
    elif arguments.write or arguments.set or arguments.output or arguments.keep:
        raise UserError("--write, --set, --output and --keep go with --table")
    else:
        report_runs(arguments.runs, arguments.figures)


def report_runs(folders: Sequence[Path], figures: Path | None) -> None:
    """Print a table of finished runs, and draw their curves into the folder `figures`."""
    print(runs_table(folders))
    if figures is None:
        return
    figures.mkdir(parents=True, exist_ok=True)
    steps = {}
    for folder in folders:
        label = f"{folder.resolve().name} ({read_run_results(folder).label})"
        steps[label] = read_metrics(folder)
    paths = plot_runs(steps, figures)
    print("plots: " + " ".join(map(str, paths)))


if __name__ == "__main__":
    run_command(main)
