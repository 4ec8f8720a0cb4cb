"""One rank of runs of several architectures and methods: `architectures.py RECIPE BASES OUTPUT ENGINE`.

BASES has a folder for each architecture, with ids.json. Each run's folder is OUTPUT/NAME/METHOD.
What became of it is in cell.json: `line`, that the user reads
where it is refused, and `fault`, the traceback of any other error.
The logits of a trained, sharded model on the ids are kept beside it.
"""

import gc
import json
import sys
import traceback
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch

from launch import pipeline
from launch.config.loading import read_recipe
from launch.config.schema import Recipe
from launch.runtime.distributed import run_on_rank0, start_process_group, stop_process_group
from launch.runtime.entry import run_command
from launch.runtime.errors import USER_ERRORS, describe_error
from launch.runtime.files import write_json
from tests.support.architectures import CELL_SETTINGS, METHODS, TARGETS
from tests.support.worker import keeping_logits, read_arguments, skip_plots


def run_cell(recipe: Recipe, folder: Path, device: torch.device, ids: list[list[int]]) -> None:
    """Run every stage, with the logits of the trained model in the place of scores."""

    line, fault = None, None
    with keeping_logits(folder, ids):
        try:
            pipeline.run_stages(recipe, recipe.adapter.method, folder, device)
        except USER_ERRORS as error:  # the same on every rank
            line = describe_error(error)
        except Exception:  # noqa: BLE001 (a fault of one cell is not to hide the others)
            fault = traceback.format_exc()
    run_on_rank0(lambda: write_json(folder / "cell.json", {"line": line, "fault": fault}))
    gc.collect()  # transformers loads with ZeRO-3 as long as that run's engine is alive


def main(recipe_path: str, bases: Path, output: Path, engine: str) -> None:
    """Train every architecture with every method."""
    device = start_process_group()
    skip_plots()
    for base in sorted(bases.iterdir()):
        ids = json.loads((base / "ids.json").read_text())
        for method in METHODS:
            settings = [f"model.name={base}", f"engine={engine}", f"adapter.method={method}"]
            if method != "full" and base.name in TARGETS:
                settings.append(f"adapter.targets={TARGETS[base.name]}")
            recipe = read_recipe(recipe_path, [*CELL_SETTINGS, *settings])
            folder = output / base.name / method
            run_on_rank0(lambda folder=folder: folder.mkdir(parents=True))
            run_cell(recipe, folder, device, ids)
    stop_process_group()


if __name__ == "__main__":
    recipe_path, bases, output, engine = read_arguments()
    run_command(lambda: main(recipe_path, Path(bases), Path(output), engine))
