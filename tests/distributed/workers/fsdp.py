"""One rank of a calibration and initialisation under FSDP2: `fsdp.py RECIPE OUTPUT`.

Writes to OUTPUT/rankI.safetensors the subspaces, W_res, how far the logits moved, and how much of
every base parameter this rank holds.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from astra import adapter
from launch.config.loading import read_recipe
from launch.data import token_cache as prepared
from launch.data.batches import collate_examples
from launch.data.order import sample_examples, shard_batches
from launch.engines import make_engine
from launch.models.check import check_model
from launch.runtime.distributed import start_process_group, stop_process_group
from launch.runtime.entry import run_command
from tests.support.calibration import (
    find_subspaces,
    find_subspaces_by_layer,
    make_factor_source,
)
from tests.support.worker import read_arguments

SEED = 5


class HeldSizes:
    """The numbers of elements of every base parameter that are in this rank's memory, over time.

    Parameters are found through their modules: adapters change the modules' names, and sharding
    makes other parameters.
    """

    def __init__(self, base: nn.Module) -> None:
        self._owners = {}
        for path, module in base.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                self._owners[f"{path}.{name}"] = (module, name)
        # The whole size, then one element for each call of `record`.
        self.sizes = {
            key: [module.get_parameter(name).numel()]
            for key, (module, name) in self._owners.items()
        }

    def record(self) -> None:
        """Add the present sizes."""
        for key, (module, name) in self._owners.items():
            self.sizes[key].append(count_held(module.get_parameter(name)))


def count_held(parameter: nn.Parameter) -> int:
    """Return the number of elements in this rank's memory."""
    if parameter.is_meta:
        return 0
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return max(local.numel(), local.untyped_storage().nbytes() // local.element_size())


@torch.no_grad()
def main(recipe_path: str, output: Path) -> None:
    """Calibrate and initialise with the recipe, and save everything that the test compares."""
    recipe = read_recipe(recipe_path, [])
    device = start_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tokens = prepared.obtain_tokens(recipe.data, Path(recipe.model.name)).open_tokens()
    engine = make_engine("fsdp", device, torch.float32)
    base = engine.load_model(check_model(Path(recipe.model.name)))
    held = HeldSizes(base)
    held.record()
    lora_rank = recipe.adapter.rank
    model = adapter.attach_adapters(
        base, recipe.adapter.targets, lora_rank, recipe.adapter.alpha, 0.0
    )
    layers = adapter.get_lora_layers(model)
    linears = adapter.get_base_layers(layers)
    ids = sample_examples(len(tokens), recipe.calibration.samples, recipe.calibration.seed)
    shard = shard_batches(ids, rank, world_size, recipe.calibration.batch_size)
    batches = [collate_examples(tokens, rows, device)[0] for rows in shard]
    probe = batches[0]["input_ids"]

    engine.materialize(model)
    with engine.inference_mode(model), model.disable_adapter():
        held.record()
        wanted = {"rank": lora_rank, "select": "largest", "seed": SEED}
        subspaces = find_subspaces(model, linears, batches, engine, **wanted)
        before = model(input_ids=probe).logits
        by_layer = find_subspaces_by_layer(model, linears, batches, engine, **wanted)
    adapter.initialise_layers(layers, make_factor_source(subspaces), engine)
    moved = (model(input_ids=probe).logits - before).abs().max() / before.abs().max()
    held.record()

    tensors = {"moved": moved}
    for name, sizes in held.sizes.items():
        tensors[f"held.{name}"] = torch.tensor(sizes)
    for name, subspace in subspaces.items():
        tensors[f"largest.{name}.vectors"] = subspace.vectors.contiguous()
        tensors[f"by_layer.{name}.vectors"] = by_layer[name].vectors.contiguous()
        tensors[f"residual.{name}"] = engine.read(linears[name].weight).contiguous()
    save_file(tensors, output / f"rank{rank}.safetensors")
    stop_process_group()


if __name__ == "__main__":
    recipe_path, output = read_arguments()
    run_command(lambda: main(recipe_path, Path(output)))
