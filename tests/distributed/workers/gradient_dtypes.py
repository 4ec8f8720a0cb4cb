"""One rank that trains a bf16 base for two steps on each engine: `gradient_dtypes.py RECIPE OUTPUT`.

Rank 0 writes OUTPUT/dtypes.json: "engine method" -> the dtypes of what was summed over ranks.
"""

import gc
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import isfunction
from pathlib import Path
from unittest import mock

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import torch.distributed as dist

from launch import pipeline
from launch.config.loading import read_recipe
from launch.engines.single import TorchTrainState
from launch.engines.zero import ZeroTrainState
from launch.runtime.distributed import run_on_rank0, start_process_group, stop_process_group
from launch.runtime.entry import run_command
from tests.support.cases import NO_SCORES
from tests.support.worker import read_arguments, skip_plots

# Every function of torch.distributed that sums, whatever a release calls it; and all_to_all_single,
# after which DeepSpeed adds up itself.
SUMS = [name for name in vars(dist) if "reduce" in name and isfunction(getattr(dist, name))]
SUMS.append("all_to_all_single")
SETTINGS = ["model.dtype=bfloat16", "train.max_steps=2", NO_SCORES]
METHODS = ("lora", "dora")  # with autocast and without it (launch.training.loss)


@contextmanager
def record_sums() -> Iterator[set[str]]:
    """Within the context, record the dtypes of what is summed over ranks in a backward pass or step.

    The training loop's own sums of two losses are outside of both.
    """
    seen: set[str] = set()
    depth = 0

    def spy(function: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            for value in (*arguments, *options.values()):
                for tensor in value if isinstance(value, list) else [value]:
                    # Flags and norms are scalars, or nearly so.
                    if depth and isinstance(tensor, torch.Tensor) and tensor.numel() > 8:
                        seen.add(str(tensor.dtype))
            return function(*arguments, **options)

        return call

    def inside(function: Callable) -> Callable:
        def call(*arguments: object) -> object:
            nonlocal depth
            depth += 1
            try:
                return function(*arguments)
            finally:
                depth -= 1

        return call

    with ExitStack() as patches:
        for name in SUMS:
            patches.enter_context(mock.patch.object(dist, name, spy(getattr(dist, name))))
        for state in (ZeroTrainState, TorchTrainState):
            for name in ("backward", "step"):
                method = inside(getattr(state, name))
                patches.enter_context(mock.patch.object(state, name, method))
        yield seen


def main(recipe_path: str, output: Path) -> None:
    """Train on each engine and write what was seen."""
    device = start_process_group()
    skip_plots()
    dtypes = {}
    with record_sums() as seen:  # once, since DeepSpeed keeps the functions that it finds first
        for engine, method in itertools.product(("zero3", "zero2", "fsdp"), METHODS):
            folder = output / f"{engine}-{method}"
            run_on_rank0(folder.mkdir)
            settings = [f"engine={engine}", f"adapter.method={method}", *SETTINGS]
            recipe = read_recipe(recipe_path, settings)
            seen.clear()
            pipeline.run_stages(recipe, "gradient dtypes", folder, device)
            dtypes[f"{engine} {method}"] = sorted(seen)
            gc.collect()  # transformers loads with ZeRO-3 as long as that run's engine is alive
    run_on_rank0(lambda: (output / "dtypes.json").write_text(json.dumps(dtypes)))
    stop_process_group()


if __name__ == "__main__":
    recipe_path, output = read_arguments()
    run_command(lambda: main(recipe_path, Path(output)))
