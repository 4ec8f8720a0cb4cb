"""From a recipe to a trained, exported and evaluated adapter. Started again, it goes on from its last checkpoint."""

import sys
from pathlib import Path

if (
    not __package__
):  # run as a script: the repository root, not launch/, is where imports are looked up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch import cli, plan
from launch.runtime.errors import UserError, run

EXAMPLES = """\
  deepspeed --num_gpus 2 launch/train.py --recipe quickstart
  deepspeed launch/train.py --recipe metamath --output runs/metamath
  deepspeed launch/train.py --recipe metamath --set model.name=/models/llama --set train.lr=1e-4
  python launch/train.py --recipe runs/metamath/recipe.yaml --set engine=single --output runs/again"""


def main() -> None:
    parser = cli.parser(__doc__, EXAMPLES, fields=True)
    cli.add_recipe(parser)
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
    plan.add_machine(parser)
    arguments = parser.parse_args()
    if arguments.peak_tflops is not None and arguments.peak_tflops <= 0:
        raise UserError("--peak-tflops: must be above 0")
    recipe, name = cli.read_recipe(arguments)
    if arguments.plan:
        plan.show(recipe, arguments)
        return

    from launch.pipeline import (
        fine_tune,
    )  # takes seconds, so only when the recipe is known to be good

    folder = arguments.output or Path("runs") / name
    fine_tune(recipe, name, folder, arguments.stall, arguments.profile, arguments.peak_tflops)


if __name__ == "__main__":
    run(main)
