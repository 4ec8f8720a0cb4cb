"""One rank of runs of several methods: `trainable.py RECIPE OUTPUT ENGINE METHODS [SOURCE ...]`.

METHODS are names in TRAINABLE_METHODS, with commas. Each is trained undisturbed, then its run is cut
back to the middle checkpoint and resumed. With SOURCEs, the output folders of other engines, their
runs are resumed instead. The logits of the trained, sharded model on the ids in OUTPUT/ids.json are
kept in the run folder.
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import torch.distributed as dist

from launch import pipeline
from launch.config.loading import read_recipe
from launch.config.schema import Recipe
from launch.runtime.distributed import (
    FOREVER,
    run_on_rank0,
    start_process_group,
    stop_process_group,
)
from launch.runtime.entry import run_command
from tests.support.cases import NO_SCORES, TRAINABLE_METHODS, TRAINABLE_STEPS
from tests.support.runs import copy_unfinished
from tests.support.worker import keeping_logits, read_arguments, skip_plots

MIDDLE_STEP = 2


def fine_tune(recipe: Recipe, folder: Path, device: torch.device, ids: list[list[int]]) -> None:
    """Run every stage, with the logits of the trained model in the place of scores."""

    with keeping_logits(folder, ids):
        pipeline.run_stages(recipe, recipe.adapter.method, folder, device)


def main(
    recipe_path: str, output: Path, engine: str, methods: list[str], sources: list[Path]
) -> None:
    """Train and resume every method."""
    device = start_process_group()
    skip_plots()
    ids = json.loads((output / "ids.json").read_text())
    for name in methods:
        settings = [f"engine={engine}", NO_SCORES, *TRAINABLE_STEPS, *TRAINABLE_METHODS[name]]
        recipe = read_recipe(recipe_path, settings)
        finished = [source / name for source in sources]
        if not sources:
            whole = output / name
            run_on_rank0(whole.mkdir)
            fine_tune(recipe, whole, device, ids)
            finished = [whole]
        for number, folder in enumerate(finished):
            copy = output / f"{name}-resumed-{number}"
            run_on_rank0(
                lambda folder=folder, copy=copy: copy_unfinished(folder, copy, MIDDLE_STEP)
            )
            fine_tune(recipe, copy, device, ids)
    for group in dist.distributed_c10d._world.pg_map:  # also the groups of the libraries
        assert group._get_backend(device).options._timeout == FOREVER
    stop_process_group()


if __name__ == "__main__":
    recipe_path, output, engine, methods, *sources = read_arguments()
    folders = [Path(source) for source in sources]
    run_command(lambda: main(recipe_path, Path(output), engine, methods.split(","), folders))
