"""One rank of a run of each method, one after another: `methods.py RECIPE ENGINE OUTPUT`.

The run of one method is then cut back to its first step and resumed.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

from launch import pipeline
from launch.config.loading import read_recipe
from launch.run.folder import open_run
from launch.runtime.distributed import run_on_rank0, start_process_group, stop_process_group
from launch.runtime.entry import run_command
from launch.runtime.locks import FolderLock
from tests.support.cases import METHODS, NO_SCORES, RESUMED_METHOD
from tests.support.runs import copy_unfinished
from tests.support.worker import read_arguments, skip_plots

COMMON = ["train.max_steps=3", "train.checkpoint_every=1", NO_SCORES]


def main(recipe_path: str, engine: str, output: Path) -> None:
    """Train with every method."""
    device = start_process_group()
    skip_plots()

    def fine_tune(name: str, folder: Path) -> None:
        recipe = read_recipe(recipe_path, [*COMMON, f"engine={engine}", *METHODS[name]])
        lock = FolderLock(folder)
        run_on_rank0(lambda: open_run(folder, recipe, lock) and None)
        pipeline.run_stages(recipe, name, folder, device)

    for name in METHODS:
        fine_tune(name, output / name)
    whole, resumed = output / RESUMED_METHOD, output / f"{RESUMED_METHOD}-resumed"
    run_on_rank0(lambda: copy_unfinished(whole, resumed, 1))
    fine_tune(RESUMED_METHOD, resumed)
    stop_process_group()


if __name__ == "__main__":
    recipe_path, engine, output = read_arguments()
    run_command(lambda: main(recipe_path, engine, Path(output)))
