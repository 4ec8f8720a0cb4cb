"""Make a recipe's calibration alone, for runs to take as calibration.path.

Started again, it resumes after the last finished window. --after RUN measures instead what the
training of a finished run did to the outputs: their effective ranks, before and after, on the run's
calibration rows. --compare A B prints the angles between the subspaces of two calibrations."""

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # run as a script: imports are to be looked up from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch import cli
from launch.config.schema import Recipe
from launch.runtime.entry import run_command
from launch.runtime.errors import UserError

EXAMPLES = """\
  deepspeed launch/calibrate.py --recipe metamath --output calibrations/metamath
  deepspeed launch/calibrate.py --recipe metamath --set calibration.memory_gib=8 --output calibrations/metamath
  deepspeed launch/train.py --recipe metamath --set calibration.path=calibrations/metamath
  python launch/calibrate.py --after runs/quickstart --engine single
  python launch/calibrate.py --compare calibrations/own calibrations/wikitext2 --output angles"""


def main() -> None:
    """Calibrate, or measure a finished run, as the command line says."""
    parser = cli.make_parser(__doc__, EXAMPLES, fields=True)
    cli.add_recipe_options(parser, required=False)
    parser.add_argument("--output", type=Path, help="folder of the calibration")
    parser.add_argument(
        "--after",
        type=Path,
        metavar="RUN",
        help="folder of a finished run to measure; no --recipe then",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar="CALIBRATION",
        help="folders of two calibrations; writes the angles between them to --output",
    )
    arguments = parser.parse_args()
    if arguments.compare:
        _compare(arguments)
        return
    if arguments.after:
        if arguments.recipe or arguments.set or arguments.output:
            raise UserError(
                "--after: the run says what is measured and where; only --engine can be given with "
                "it"
            )
        _measure_run(arguments.after, arguments.engine, arguments.stall)
        return
    for name in ("recipe", "output"):
        if getattr(arguments, name) is None:
            raise UserError(f"--{name}: is required")
    recipe, _ = cli.read_recipe_options(arguments)
    _calibrate(recipe, arguments.output, arguments.stall)


def _compare(arguments: argparse.Namespace) -> None:
    """Print the angles between two calibrations, and write them to --output."""
    if arguments.recipe or arguments.set or arguments.after or arguments.engine:
        raise UserError(
            "--compare: the two folders say what is compared; only --output goes with it"
        )
    if arguments.output is None:
        raise UserError("--output: is required; the angles and their figures are written there")
    from launch.calibration.compare_calibrations import compare_calibrations

    if int(os.environ.get("RANK", "0")) == 0:  # a launcher may start several
        print(compare_calibrations(*arguments.compare, arguments.output), flush=True)
        print(f"angles and figures: {arguments.output}", flush=True)


def _calibrate(recipe: Recipe, output: Path, stall: float) -> None:
    """Make the calibration of `recipe` in `output`."""
    # These take seconds to import, so only when the recipe is known to be good.
    from launch.calibration.run import calibrate_alone, open_calibration_folder
    from launch.data.inputs import prepare_inputs
    from launch.planning.budget import decide_memory
    from launch.planning.decisions import decide_run
    from launch.quickstart.base import resolve_quickstart
    from launch.runtime import watchdog
    from launch.runtime.distributed import start_process_group, stop_process_group

    device = start_process_group(stall)
    lock = open_calibration_folder(recipe, output)
    watchdog.set_phase("reading the inputs")
    recipe = resolve_quickstart(recipe, device)
    inputs = prepare_inputs(recipe, device)
    if recipe.engine == "auto":  # the one that trains it; checkpointing is of no use here
        recipe, _ = decide_run(recipe, inputs, device, {})
    recipe, _ = decide_memory(recipe, inputs, device, output)
    calibrate_alone(recipe, inputs, output, device)
    stop_process_group()
    del lock  # held until here


def _measure_run(run: Path, engine: str | None, stall: float) -> None:
    """Measure what the training of a finished run did to the outputs."""
    from launch.calibration.effective_rank import (
        find_unfinished,
        limit_samples,
        make_measuring_recipe,
        measure_effective_ranks,
    )
    from launch.data.inputs import prepare_inputs
    from launch.planning.budget import decide_memory
    from launch.quickstart.base import resolve_quickstart
    from launch.runtime import watchdog
    from launch.runtime.distributed import start_process_group, stop_process_group

    device = start_process_group(stall)
    recipe = resolve_quickstart(make_measuring_recipe(run, engine), device)
    watchdog.set_phase("reading the inputs")
    inputs = prepare_inputs(recipe, device)
    recipe = limit_samples(recipe, inputs)
    recipe, _ = decide_memory(recipe, inputs, device, find_unfinished(run))
    measure_effective_ranks(run, recipe, inputs, device)
    stop_process_group()


if __name__ == "__main__":
    run_command(main)
