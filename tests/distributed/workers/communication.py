"""One rank that trains on each sharding engine: `communication.py RECIPE OUTPUT`.

Rank 0 writes OUTPUT/bytes.json: engine -> bytes of the weights, of what is trained, the number of
micro batches, and what a step's collectives worked on, by kind. `zero3, large` is ZeRO-3 as it
treats a model of more than stage3_max_live_parameters.
"""

import gc
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from inspect import isfunction
from pathlib import Path
from unittest import mock

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import torch.distributed as dist

from launch import pipeline
from launch.config.loading import read_recipe
from launch.engines import zero
from launch.engines.single import TorchTrainState
from launch.engines.zero import ZeroTrainState
from launch.runtime.compat.deepspeed_parts import get_full_shape
from launch.runtime.distributed import run_on_rank0, start_process_group, stop_process_group
from launch.runtime.entry import run_command
from tests.support.cases import NO_SCORES
from tests.support.worker import read_arguments, skip_plots

KINDS = {"gather": "gathered", "reduce_scatter": "scattered", "all_reduce": "reduced"}
SETTINGS = ["model.dtype=bfloat16", "train.max_steps=3", "adapter.method=lora", NO_SCORES]
TINY = 1024  # bytes: the loop's own sums, and flags
SMALL_READER = zero.read_deepspeed_config


class Spy:
    """Counts the bytes of collectives from the end of step 2 to the end of step 3."""

    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()
        self.depth = self.num_micro_batches = 0
        self.step: dict[str, int] = {}

    def watch(self, name: str) -> Callable:
        """Return a function of torch.distributed that counts as well."""
        function = getattr(dist, name)
        kind = next(kind for word, kind in KINDS.items() if word in name)

        def call(*arguments: object, **options: object) -> object:
            values = [*arguments, *options.values()]
            sizes = [v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor)]
            # Of the whole and the shard the whole counts; a call within a call is the same one.
            size = max(sizes, default=0)
            if self.depth == 0 and size > TINY:
                self.counted[kind] += size
            self.depth += 1
            try:
                return function(*arguments, **options)
            finally:
                self.depth -= 1

        return call

    def end_step(self, function: Callable) -> Callable:
        """Return a TrainState's `step` that keeps what was counted."""

        def step(*arguments: object) -> object:
            norm = function(*arguments)
            self.step = dict(self.counted) | {"micro_batches": self.num_micro_batches}
            self.counted.clear()
            self.num_micro_batches = 0
            return norm

        return step

    def count_micro_batch(self, function: Callable) -> Callable:
        """Return a TrainState's `backward` that counts itself."""

        def backward(*arguments: object) -> object:
            self.num_micro_batches += 1
            return function(*arguments)

        return backward


def read_large_config(name: str) -> dict:
    """Read a DeepSpeed configuration whose ZeRO-3 keeps nothing gathered."""
    config = SMALL_READER(name)
    config["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
    return config


def count_bytes(model: torch.nn.Module, trained: bool) -> int:
    """Count the bytes of a model's parameters that are trained, or that are not."""
    parameters = [p for p in model.parameters() if p.requires_grad is trained]
    return sum(math.prod(get_full_shape(p)) * p.element_size() for p in parameters)


def main(recipe_path: str, output: Path) -> None:
    """Train on each engine and write what was counted."""
    spy, sizes = Spy(), {}
    names = [name for name in vars(dist) if isfunction(getattr(dist, name))]
    for name in names:
        if any(word in name for word in KINDS) and not name.endswith("object"):
            setattr(dist, name, spy.watch(name))
            setattr(dist.distributed_c10d, name, getattr(dist, name))
    for state in (ZeroTrainState, TorchTrainState):
        state.step = spy.end_step(state.step)
        state.backward = spy.count_micro_batch(state.backward)
    load = pipeline.load_run_model

    def load_and_measure(*arguments: object) -> object:
        loaded = load(*arguments)
        sizes["base"], sizes["trained"] = (
            count_bytes(loaded.model, trained) for trained in (False, True)
        )
        return loaded

    device = start_process_group()
    skip_plots()
    found = {}
    with mock.patch.object(pipeline, "load_run_model", load_and_measure):
        for engine in ("zero2", "fsdp", "zero3", "zero3, large"):
            is_large = engine.endswith("large")
            zero.read_deepspeed_config = read_large_config if is_large else SMALL_READER
            folder = output / engine
            run_on_rank0(folder.mkdir)
            settings = [f"engine={engine.split(',')[0]}", *SETTINGS]
            recipe = read_recipe(recipe_path, settings)
            pipeline.run_stages(recipe, "communication", folder, device)
            found[engine] = spy.step | sizes
            gc.collect()  # transformers loads with ZeRO-3 as long as that run's engine is alive
    run_on_rank0(lambda: (output / "bytes.json").write_text(json.dumps(found)))
    stop_process_group()


if __name__ == "__main__":
    recipe_path, output = read_arguments()
    run_command(lambda: main(recipe_path, Path(output)))
