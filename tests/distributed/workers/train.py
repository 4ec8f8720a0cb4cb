"""One rank of several runs of train.py's main path: `train.py RECIPE CASES [NODE_SIZE]`.

CASES is a JSON file, [[settings, run folder], ...], of runs that are made one after another: to
start a process costs more than a run of the tests' tiny model. With NODE_SIZE, rank i is on node
i // NODE_SIZE, as far as the launcher's variables say it.
"""

import gc
import json
import os
import sys
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

from launch import pipeline
from launch.config.loading import read_recipe
from launch.run.folder import open_run
from launch.runtime.distributed import run_on_rank0, start_process_group, stop_process_group
from launch.runtime.entry import run_command
from launch.runtime.locks import FolderLock
from tests.support.worker import read_arguments, skip_plots


def main(recipe_path: str, cases: str, node_size: str | None = None) -> None:
    """Train every case."""
    if node_size is not None:
        os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % int(node_size))
        os.environ["LOCAL_WORLD_SIZE"] = node_size
    device = start_process_group()
    skip_plots()
    for settings, folder in json.loads(Path(cases).read_text()):
        recipe = read_recipe(recipe_path, settings)
        lock = FolderLock(Path(folder))
        run_on_rank0(partial(open_run, Path(folder), recipe, lock))
        pipeline.run_stages(recipe, Path(recipe_path).stem, Path(folder), device)
        gc.collect()  # transformers loads with ZeRO-3 as long as that run's engine is alive
    stop_process_group()


if __name__ == "__main__":
    run_command(lambda: main(*read_arguments()))
