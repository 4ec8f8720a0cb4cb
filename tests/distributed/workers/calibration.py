"""One rank of a calibration under ZeRO-3: `calibration.py RECIPE OUTPUT`.

Writes to OUTPUT/rankI.safetensors the summed moments, the subspaces, and how much of every base
parameter this rank holds.
"""

import copy
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from astra import adapter
from astra.calibrate import assign_owners, solve_window, sum_second_moments
from astra.eigen import Subspace
from astra.reduction import reduce_sums
from launch.config.loading import read_recipe
from launch.data import token_cache as prepared
from launch.data.batches import collate_examples
from launch.data.order import sample_examples, shard_batches
from launch.engines import make_engine
from launch.models.check import check_model
from launch.runtime.distributed import start_process_group, stop_process_group
from launch.runtime.entry import run_command
from tests.support.calibration import (
    find_subspaces_by_layer,
    make_solver,
    plan_calibration,
    to_subspace,
)
from tests.support.worker import read_arguments

SEED = 5
SELECTS = ("smallest", "largest", "middle", "random")


def main(recipe_path: str, output: Path) -> None:
    """Calibrate with the recipe and save everything that the test compares."""
    recipe = read_recipe(recipe_path, [])
    device = start_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tokens = prepared.obtain_tokens(recipe.data, Path(recipe.model.name)).open_tokens()
    engine = make_engine("zero3", device, torch.float32)
    base = engine.load_model(check_model(Path(recipe.model.name)))
    parameters = dict(base.named_parameters())
    loaded = {name: (p.ds_tensor.numel(), p.ds_numel, p.numel()) for name, p in parameters.items()}
    lora_rank = recipe.adapter.rank
    model = adapter.attach_adapters(
        base, recipe.adapter.targets, lora_rank, recipe.adapter.alpha, 0.0
    )
    linears = adapter.get_base_layers(adapter.get_lora_layers(model))
    lora_ranks = dict.fromkeys(linears, lora_rank)
    ids = sample_examples(len(tokens), recipe.calibration.samples, recipe.calibration.seed)
    shard = shard_batches(ids, rank, world_size, recipe.calibration.batch_size)
    batches = [collate_examples(tokens, rows, device)[0] for rows in shard]

    with engine.inference_mode(model), model.disable_adapter():
        plan = plan_calibration(model, linears, batches)
        (window,) = plan.windows
        moments = sum_second_moments(model, linears, batches, window, plan, [None] * len(batches))
        owners = assign_owners(window.groups, linears, lora_ranks, plan.decomposition, device.type)
        by_owner = copy.deepcopy(moments)
        reduce_sums(by_owner, owners, "owner")
        reduce_sums(moments, owners)
        subspaces = {}
        for select in SELECTS:
            found = solve_window(
                window.groups,
                [list(moments)],
                owners,
                linears,
                engine,
                make_solver(select, SEED),
                lora_ranks=lora_ranks,
                solve_device=device,
            )
            subspaces[select] = {name: to_subspace(module) for name, module in found.items()}
        subspaces["by_layer"] = find_subspaces_by_layer(
            model, linears, batches, engine, rank=lora_rank, select="middle", seed=SEED
        )
        after = {name: p.numel() for name, p in parameters.items()}

    tensors = name_moments("moment", window.groups, moments) | name_subspaces(subspaces)
    owned = [i for i, owner in enumerate(owners) if owner == rank]
    tensors |= name_moments(
        "owned", [window.groups[i] for i in owned], [by_owner[i] for i in owned]
    )
    for name, sizes in loaded.items():
        tensors[f"held.{name}"] = torch.tensor([*sizes, after[name]])
    save_file(tensors, output / f"rank{rank}.safetensors")
    stop_process_group()


def name_moments(kind: str, groups: Sequence, moments: Sequence) -> dict[str, torch.Tensor]:
    """Return the parts of every moment by statistic, modules and part."""
    tensors = {}
    for group, moment in zip(groups, moments, strict=True):
        prefix = f"{kind}.{group.statistic}.{'+'.join(group.modules)}"
        tensors[f"{prefix}.outer"] = moment.outer_sum()
        tensors[f"{prefix}.total"] = moment.total
        tensors[f"{prefix}.count"] = moment.count
    return tensors


def name_subspaces(subspaces: dict[str, dict[str, Subspace]]) -> dict[str, torch.Tensor]:
    """Return vectors and values of every subspace by selection and module."""
    tensors = {}
    for select, modules in subspaces.items():
        for name, subspace in modules.items():
            tensors[f"{select}.{name}.vectors"] = subspace.vectors.contiguous()
            tensors[f"{select}.{name}.values"] = subspace.values.contiguous()
    return tensors


if __name__ == "__main__":
    recipe_path, output = read_arguments()
    run_command(lambda: main(recipe_path, Path(output)))
