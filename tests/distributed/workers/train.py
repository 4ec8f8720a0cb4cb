"""One rank of several runs of train.py's main path, one after another: `train.py RECIPE CASES`, a JSON file.

A start of a process costs more than a run of the tests' model; cases: [[settings, run folder], ...].
"""

import gc
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

from matplotlib.figure import Figure

from launch import pipeline
from launch.config.schema import read
from launch.run.folder import open_run
from launch.runtime.distributed import on_rank0, start, stop
from launch.runtime.errors import run


def main(recipe_path: str, cases: str) -> None:
    device = start()
    Figure.savefig = lambda *_, **__: None  # half of the time; plots are looked at elsewhere
    for settings, folder in json.loads(Path(cases).read_text()):
        recipe = read(recipe_path, settings)
        on_rank0(lambda folder=folder, recipe=recipe: open_run(Path(folder), recipe))
        pipeline.run_stages(recipe, Path(recipe_path).stem, Path(folder), device)
        gc.collect()  # transformers keeps to ZeRO-3 as long as the run's engine is alive
    stop()


if __name__ == "__main__":
    paths = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    run(lambda: main(*paths))
