"""Run what is missing of a table. A run that fails is named at the end, and the others still run.

Each run is launch/train.py in a folder of its own, named by its row and a hash of its resolved
recipe, so runs made under other settings stay apart. Ended or killed at any time, the same command
resumes. Exit codes: 0 all runs are there, 1 some failed, 2 something to mend before any can start,
75 told to stop."""

import argparse
import shlex
import sys
from pathlib import Path

if not __package__:  # run as a script: imports are to be looked up from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch import cli
from launch.runtime.entry import run_command
from launch.runtime.errors import UserError
from launch.sweeps.jobs import print_jobs, run_sweep
from launch.sweeps.slurm import write_slurm_script
from launch.sweeps.table import read_table

EXAMPLES = """\
  python launch/sweep.py --table miniature --jobs 2
  python launch/sweep.py --table maths --launch "deepspeed --num_gpus 8" --set model.name=/models/llama-2-7b
  python launch/sweep.py --table maths --slurm maths.sbatch; sbatch maths.sbatch
  python launch/report.py --table maths --set model.name=/models/llama-2-7b        # with the sweep's own options"""

OF_RUNNING = {"jobs", "launch"}  # options that have no use where nothing is run


def main() -> None:
    """Run, list or submit the runs of a table, as the command line says."""
    arguments = read_command_line()
    sweep = read_table(arguments.table, arguments.set, arguments.output, arguments.keep)
    cells = sweep.list_cells()
    if arguments.only is not None:
        if not 0 <= arguments.only < len(cells):
            raise UserError(f"--only: {arguments.only} is none of the rows 0 to {len(cells) - 1}")
        cells = [cells[arguments.only]]
    if arguments.slurm:
        write_slurm_script(arguments.slurm, sweep)
    elif arguments.list:
        print_jobs(sweep, cells)
    else:
        launcher = shlex.split(arguments.launch)
        sys.exit(run_sweep(sweep, cells, arguments.jobs, launcher, arguments.keep is not None))


def read_command_line() -> argparse.Namespace:
    """Read the command line. Raises UserError."""
    parser = cli.make_parser(__doc__, EXAMPLES)
    cli.add_table_options(parser)
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs side by side, on CPUs (default 1)"
    )
    parser.add_argument(
        "--launch",
        default=sys.executable,
        help='what starts a run, such as "deepspeed --num_gpus 8" (default python)',
    )
    parser.add_argument(
        "--only",
        type=int,
        metavar="INDEX",
        help="only this entry of --list, as a task of an array does",
    )
    parser.add_argument(
        "--list", action="store_true", help="print the rows and their runs, and run nothing"
    )
    parser.add_argument(
        "--slurm",
        type=Path,
        metavar="FILE",
        help="write a batch script with a task for each row, at each of its varied values",
    )
    arguments = parser.parse_args()
    if arguments.table is None:
        raise UserError("--table: is required")
    if arguments.jobs < 1:
        raise UserError("--jobs: must be above 0")
    _refuse_unused(parser, arguments)
    return arguments


def _refuse_unused(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Raise UserError for options that would be ignored beside the others."""
    if arguments.slurm:
        what, unused = "--slurm", OF_RUNNING | {"only", "list"}
    elif arguments.list:
        what, unused = "--list", OF_RUNNING
    else:
        return
    values = vars(arguments)
    given = [name for name in sorted(unused) if values[name] != parser.get_default(name)]
    if given:
        options = ", ".join(f"--{name}" for name in given)
        raise UserError(f"{options}: no effect with {what}; leave out")


if __name__ == "__main__":
    run_command(main)
