"""One rank of a calibration and initialisation under FSDP2: saves subspaces, W_res and how far the logits moved."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from astra import adapter, inits
from astra.weights import TorchWeights
from launch import data as launch_data
from launch import prepared
from launch.distributed import start, stop
from launch.errors import run
from launch.recipe import read
from tests.whole import subspaces_by_layer, subspaces_of


@torch.no_grad()
def main(recipe_path: str, output: Path) -> None:
    recipe = read(recipe_path, [])
    device = start()
    rank, world_size, weights = dist.get_rank(), dist.get_world_size(), TorchWeights()
    tokens = prepared.obtain(recipe.data, Path(recipe.model.name)).open()
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name, dtype=torch.float32)
    model = adapter.attach(base, recipe.adapter.targets, recipe.adapter.rank, recipe.adapter.alpha, 0.0).eval()
    for layer in base.model.layers:
        fully_shard(layer)
    fully_shard(model)
    layers = adapter.lora_layers(model)
    linears = adapter.base_layers(layers)
    sharded = all(linear.weight.to_local().numel() * world_size == linear.weight.numel() for linear in linears.values())

    ids = launch_data.choose(len(tokens), recipe.calibration.samples, recipe.calibration.seed)
    share = launch_data.deal(ids, rank, world_size, recipe.calibration.batch_size)
    batches = [launch_data.collate(tokens, rows, device)[0] for rows in share]
    with model.disable_adapter():
        found = subspaces_of(model, linears, batches, weights, rank=recipe.adapter.rank, select="largest", seed=5)
        before = model(input_ids=batches[0]["input_ids"]).logits
        by_layer = subspaces_by_layer(
            model, linears, batches, weights, rank=recipe.adapter.rank, select="largest", seed=5
        )
    adapter.initialise(layers, lambda name, weight: inits.astra(weight, found[name]), weights)
    moved = (model(input_ids=batches[0]["input_ids"]).logits - before).abs().max() / before.abs().max()

    tensors = {"moved": moved, "sharded": torch.tensor(sharded)}
    for name, subspace in found.items():
        tensors[f"largest.{name}.vectors"] = subspace.vectors.contiguous()
        tensors[f"by_layer.{name}.vectors"] = by_layer[name].vectors.contiguous()
        tensors[f"residual.{name}"] = weights.read(linears[name].weight).contiguous()
    save_file(tensors, output / f"rank{rank}.safetensors")
    stop()


if __name__ == "__main__":
    run(lambda: main(sys.argv[1], Path(sys.argv[2])))
