"""One rank of runs of several methods in one process: each undisturbed, and gone on with from its middle checkpoint.

The trained, sharded model's logits on the ids in ids.json are kept in the run folder.
"""

import json
import shutil
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import nn

from launch import pipeline
from launch.config.schema import Recipe, read
from launch.engines import Engine
from launch.runtime.distributed import FOREVER, on_rank0, start, stop
from launch.runtime.errors import run

STEPS = ["train.max_steps=4", "train.checkpoint_every=2"]
FULL = [
    "adapter.method=full",
    "train.gradient_checkpointing=true",
    "train.weight_decay=0.1",
    "train.lr=0.003",
]
CASES = {  # and their settings
    "rslora": ["adapter.method=rslora", "train.weight_decay=0.1"],
    "dora": ["adapter.method=dora", "train.gradient_checkpointing=true"],
    "full": FULL,
    "full_bf16": [*FULL, "model.dtype=bfloat16", "train.lr=0.0003"],
}


def fine_tune(recipe: Recipe, folder: Path, device: torch.device, ids: list[list[int]]) -> None:
    """A whole run, with the logits of the trained model in the place of scores."""

    def keep_logits(engine: Engine, model: nn.Module, *_: object) -> dict:
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor(ids)).logits
        on_rank0(lambda: torch.save(logits, folder / "logits.pt"))
        return {}

    pipeline.score = keep_logits
    pipeline.run_stages(recipe, recipe.adapter.method, folder, device)


def main(recipe_path: str, output: Path, engine: str, sources: list[Path]) -> None:
    device = start()
    Figure.savefig = lambda *_, **__: None  # half of the time; plots are looked at elsewhere
    ids = json.loads((output / "ids.json").read_text())
    for case, settings in CASES.items():
        recipe = read(recipe_path, [f"engine={engine}", "eval.suites=[]", *STEPS, *settings])
        folders = [source / case for source in sources]
        if not sources:
            whole = output / case
            on_rank0(whole.mkdir)
            fine_tune(recipe, whole, device, ids)
            folders = [whole]
        for number, folder in enumerate(folders):
            again = output / f"{case}-again-{number}"
            on_rank0(lambda folder=folder, again=again: before_the_end(folder, again))
            fine_tune(recipe, again, device, ids)
    for group in dist.distributed_c10d._world.pg_map:  # whoever made it
        assert group._get_backend(device).options._timeout == FOREVER
    stop()


def before_the_end(folder: Path, copy: Path) -> None:
    """A copy of a finished run as it was after its last checkpoint but one."""
    shutil.copytree(folder, copy)
    (copy / "results.json").unlink()
    shutil.rmtree(sorted((copy / "checkpoints").iterdir())[-1])


if __name__ == "__main__":
    run(
        lambda: main(
            sys.argv[1], Path(sys.argv[2]), sys.argv[3], [Path(path) for path in sys.argv[4:]]
        )
    )
