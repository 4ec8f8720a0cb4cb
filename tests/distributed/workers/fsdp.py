"""One rank of a calibration and initialisation under FSDP2: saves subspaces, W_res, how far the logits moved, and how
much of the base it holds."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from astra import adapter, inits
from launch.config.schema import read
from launch.data import token_cache as prepared
from launch.data import tokenize as launch_data
from launch.engines import make_engine
from launch.runtime.distributed import start, stop
from launch.runtime.errors import run
from tests.support.whole import subspaces_by_layer, subspaces_of


def held(parameter: nn.Parameter) -> int:
    """Elements in this rank's memory."""
    if parameter.is_meta:
        return 0
    mine = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return max(mine.numel(), mine.untyped_storage().nbytes() // mine.element_size())


@torch.no_grad()
def main(recipe_path: str, output: Path) -> None:
    recipe = read(recipe_path, [])
    device = start()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tokens = prepared.obtain(recipe.data, Path(recipe.model.name)).open()
    engine = make_engine("fsdp", device, torch.float32)
    base = engine.load(recipe.model.name)
    # By module: adapters change the modules' names, and sharding makes other parameters.
    owners = {
        (path, name): m
        for path, m in base.named_modules()
        for name, _ in m.named_parameters(recurse=False)
    }
    sizes = {".".join(of): [owner.get_parameter(of[1]).numel()] for of, owner in owners.items()}

    def weigh() -> None:
        for of, owner in owners.items():
            sizes[".".join(of)].append(held(owner.get_parameter(of[1])))

    weigh()
    model = adapter.attach(
        base, recipe.adapter.targets, recipe.adapter.rank, recipe.adapter.alpha, 0.0
    )
    layers = adapter.lora_layers(model)
    linears = adapter.base_layers(layers)
    ids = launch_data.choose(len(tokens), recipe.calibration.samples, recipe.calibration.seed)
    share = launch_data.deal(ids, rank, world_size, recipe.calibration.batch_size)
    batches = [launch_data.collate(tokens, rows, device)[0] for rows in share]
    with engine.inference(model), model.disable_adapter():
        weigh()
        found = subspaces_of(
            model, linears, batches, engine, rank=recipe.adapter.rank, select="largest", seed=5
        )
        before = model(input_ids=batches[0]["input_ids"]).logits
        by_layer = subspaces_by_layer(
            model, linears, batches, engine, rank=recipe.adapter.rank, select="largest", seed=5
        )
    adapter.initialise(layers, lambda name, weight: inits.astra(weight, found[name]), engine)
    moved = (
        model(input_ids=batches[0]["input_ids"]).logits - before
    ).abs().max() / before.abs().max()

    weigh()
    tensors = {"moved": moved} | {f"held.{name}": torch.tensor(of) for name, of in sizes.items()}
    for name, subspace in found.items():
        tensors[f"largest.{name}.vectors"] = subspace.vectors.contiguous()
        tensors[f"by_layer.{name}.vectors"] = by_layer[name].vectors.contiguous()
        tensors[f"residual.{name}"] = engine.read(linears[name].weight).contiguous()
    save_file(tensors, output / f"rank{rank}.safetensors")
    stop()


if __name__ == "__main__":
    run(lambda: main(sys.argv[1], Path(sys.argv[2])))
