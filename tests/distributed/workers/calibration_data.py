"""One rank of several calibrations, one after another: `calibration_data.py RECIPE OUTPUT CASES`.

CASES is JSON: name of a folder in OUTPUT -> overrides of the recipe.
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

from launch.calibration.run import calibrate_alone, open_calibration_folder
from launch.config.loading import read_recipe
from launch.data.inputs import prepare_inputs
from launch.runtime.distributed import start_process_group, stop_process_group
from launch.runtime.entry import run_command
from tests.support.worker import read_arguments, skip_plots


def main(recipe_path: str, output: Path, cases: dict[str, list[str]]) -> None:
    """Make the calibration of every case."""
    device = start_process_group()
    skip_plots()
    for name, overrides in cases.items():
        recipe = read_recipe(recipe_path, ["calibration.memory_gib=null", *overrides])
        lock = open_calibration_folder(recipe, output / name)
        calibrate_alone(recipe, prepare_inputs(recipe, device), output / name, device)
        del lock
    stop_process_group()


if __name__ == "__main__":
    recipe_path, output, cases = read_arguments()
    run_command(lambda: main(recipe_path, Path(output), json.loads(Path(cases).read_text())))
