"""Make a recipe's calibration alone, for runs to take as calibration.path. Started again, it goes on after the last
finished window."""

import sys
from pathlib import Path

if not __package__:  # run as a script: the repository root, not launch/, is where imports are looked up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch import cli
from launch.errors import run

EXAMPLES = """\
  deepspeed launch/calibrate.py --recipe metamath --output calibrations/metamath
  deepspeed launch/calibrate.py --recipe metamath --set calibration.memory_gib=8 --output calibrations/metamath
  deepspeed launch/train.py --recipe metamath --set calibration.path=calibrations/metamath"""


def main() -> None:
    parser = cli.parser(__doc__, EXAMPLES, fields=True)
    cli.add_recipe(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder of the calibration")
    arguments = parser.parse_args()
    recipe, _ = cli.read_recipe(arguments)

    from launch.calibration import calibrate_alone  # takes seconds, so only when the recipe is known to be good

    calibrate_alone(recipe, arguments.output, arguments.stall)


if __name__ == "__main__":
    run(main)
