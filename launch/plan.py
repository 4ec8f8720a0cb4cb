"""Estimate a run before it is paid for: memory, calibration windows, arithmetic, time and disk.

Needs only the model's config: no weights are fetched and no GPU is needed. Every example is taken
to be data.max_length tokens long, so memory is an upper bound and so, where examples are shorter,
is time. The engines are compared and one is recommended. Exit code 1: the run does not fit."""

import sys
from pathlib import Path

if not __package__:  # run as a script: imports are to be looked up from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch import cli
from launch.planning.options import add_plan_options, read_plan_options
from launch.runtime.entry import run_command

EXAMPLES = """\
  python launch/plan.py --recipe metamath --gpus 8 --gpu-name H100
  python launch/plan.py --recipe metamath --engine auto --gpus 4 --gpu-name "A100 40GB"
  python launch/plan.py --recipe metamath --set model.name=/models/llama-70b --gpus 64 --gpu-name H100 --network 100
  python launch/train.py --plan --recipe metamath --gpus 4 --gpu-memory 24 --engine fsdp"""


def main() -> None:
    """Print what the recipe of the command line would take."""
    parser = cli.make_parser(__doc__, EXAMPLES)
    cli.add_recipe_options(parser)
    add_plan_options(parser)
    arguments = parser.parse_args()
    recipe, _ = cli.read_recipe_options(arguments)
    options = read_plan_options(arguments)

    from launch.planning.printout import print_plan  # with torch it takes seconds to import

    if not print_plan(recipe, options):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
