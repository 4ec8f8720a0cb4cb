"""A recipe's calibration: its batches, its manifest, and the initial factors that follow from it."""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from astra import inits
from astra.calibrate import calibrate
from astra.eigen import Subspace
from astra.moments import Batch
from launch.data import PROMPT, TokenSet, choose, collate, deal
from launch.engines.base import Engine
from launch.export import dtype_name
from launch.inputs import Inputs
from launch.recipe import Recipe
from launch.tracking import progress


def subspaces(
    recipe: Recipe, engine: Engine, model: nn.Module, linears: Mapping[str, nn.Linear], tokens: TokenSet
) -> dict[str, Subspace]:
    """The chosen eigenvectors of every target; none for a method that needs no calibration. Collective."""
    if recipe.adapter.method != "astra":
        return {}
    settings = recipe.calibration
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = deal(choose(len(tokens), settings.samples, settings.seed), rank, world_size, settings.batch_size)
    return calibrate(
        model,
        linears,
        [collate(tokens, rows, engine.device)[0] for rows in share],
        engine,
        rank=recipe.adapter.rank,
        select=recipe.adapter.eigen_select,
        seed=settings.seed,
        progress=lambda items, name: progress(items, len(items), name, rank),
    )


def factors(recipe: Recipe, found: Mapping[str, Subspace]) -> Callable[[str, Tensor], tuple[Tensor, Tensor]]:
    """The initialiser of the recipe's method: (module name, whole W) -> fp64 (A0, B0)."""
    settings = recipe.adapter
    match settings.method:
        case "astra":
            return lambda name, weight: inits.astra(weight, found[name])
        case "lora":
            return lambda name, weight: inits.lora(weight, settings.rank, recipe.train.seed, name)


def manifest(recipe: Recipe, inputs: Inputs, conditions: dict) -> dict:
    """Everything that decides the subspaces' bytes, to go beside them."""
    settings = recipe.calibration
    return {
        "base": inputs.base,
        "dtype": dtype_name(inputs.dtype),
        "data": inputs.data,
        "prompt": PROMPT,
        "max_length": recipe.data.max_length,
        "sample_ids": choose(len(inputs.tokens), settings.samples, settings.seed),
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "eigen_select": recipe.adapter.eigen_select,
        "rank": recipe.adapter.rank,
        "targets": recipe.adapter.targets,
        "tie_break": "fixed Gaussian directions from (seed, module name), projected onto the null space",
        "conditions": conditions,
    }


def probe(tokens: TokenSet, engine: Engine) -> Batch:
    """One training row of this rank, on which the change of the logits at step 0 is measured."""
    return collate(tokens, [dist.get_rank() % len(tokens)], engine.device)[0]


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of `batch`, (rows, tokens, vocabulary), fp32. Collective for a sharded model."""
    return model(input_ids=batch["input_ids"], use_cache=False).logits.float()
