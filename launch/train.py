"""Train an adapter from a recipe, export it and score it.

Started again with the same --output, it resumes from the last checkpoint."""

import sys
from pathlib import Path

if not __package__:  # run as a script: imports are to be looked up from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch import cli
from launch.planning.options import add_plan_options, read_plan_options
from launch.runtime.entry import run_command
from launch.runtime.errors import UserError

EXAMPLES = """\
  deepspeed --num_gpus 2 launch/train.py --recipe quickstart
  deepspeed launch/train.py --recipe metamath --output runs/metamath
  deepspeed launch/train.py --recipe metamath --set model.name=/models/llama --set train.lr=1e-4
  python launch/train.py --recipe runs/metamath/recipe.yaml --set engine=single --output runs/again"""


def main() -> None:
    """Run the recipe of the command line, or print what it would take."""
    parser = cli.make_parser(__doc__, EXAMPLES, fields=True)
    cli.add_recipe_options(parser)
    parser.add_argument("--output", type=Path, help="run folder (default runs/RECIPE)")
    parser.add_argument(
        "--plan", action="store_true", help="only say what the run would take (see launch/plan.py)"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="record a few steps: a trace, and the costliest operations",
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        help="peak of a device, for its utilisation (known for many GPUs with a bf16 base)",
    )
    add_plan_options(parser)
    arguments = parser.parse_args()
    if arguments.peak_tflops is not None and arguments.peak_tflops <= 0:
        raise UserError("--peak-tflops: must be above 0")
    recipe, name = cli.read_recipe_options(arguments)
    # With torch these take seconds to import, so only when the command line is known to be good.
    if arguments.plan:
        options = read_plan_options(arguments)
        from launch.planning.printout import print_plan

        if not print_plan(recipe, options):
            sys.exit(1)
        return
    from launch.pipeline import fine_tune

    folder = arguments.output or Path("runs") / name
    fine_tune(recipe, name, folder, arguments.stall, arguments.profile, arguments.peak_tflops)


if __name__ == "__main__":
    run_command(main)
