"""Make a recipe's calibration alone, for runs to take as calibration.path. Started again, it goes on after the last
finished window. --after RUN instead measures what a finished run's training did to the outputs: their effective
ranks on its calibration rows, before and after."""

import sys
from pathlib import Path

if (
    not __package__
):  # run as a script: the repository root, not launch/, is where imports are looked up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch import cli
from launch.runtime.errors import UserError, run

EXAMPLES = """\
  deepspeed launch/calibrate.py --recipe metamath --output calibrations/metamath
  deepspeed launch/calibrate.py --recipe metamath --set calibration.memory_gib=8 --output calibrations/metamath
  deepspeed launch/train.py --recipe metamath --set calibration.path=calibrations/metamath
  python launch/calibrate.py --after runs/quickstart --engine single"""


def main() -> None:
    parser = cli.parser(__doc__, EXAMPLES, fields=True)
    cli.add_recipe(parser, required=False)
    parser.add_argument("--output", type=Path, help="folder of the calibration")
    parser.add_argument(
        "--after",
        type=Path,
        metavar="RUN",
        help="folder of a finished run to measure; no --recipe then",
    )
    arguments = parser.parse_args()
    if arguments.after:
        if arguments.recipe or arguments.set or arguments.output:
            raise UserError(
                "--after: the run says what is measured and where; only --engine can be given with it"
            )
        from launch.calibration.effective_rank import measure_run

        measure_run(arguments.after, arguments.engine, arguments.stall)
        return
    for name in ("recipe", "output"):
        if getattr(arguments, name) is None:
            raise UserError(f"--{name}: is required")
    recipe, _ = cli.read_recipe(arguments)

    from launch.calibration.run import (
        calibrate_alone,
    )  # takes seconds, so only when the recipe is known to be good

    calibrate_alone(recipe, arguments.output, arguments.stall)


if __name__ == "__main__":
    run(main)
