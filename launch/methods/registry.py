"""A recipe's method: what it needs of a calibration, what is found of each module, and the factors that follow.

A new one is a function in astra/inits.py, a name in `Adapter.method` of launch/config/schema.py, and a line or two
here.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from astra import inits
from astra.calibrate import Find, Found, Problem, find_subspace
from astra.flops import Decomposed
from astra.moments import Statistic
from launch.calibration import store as artifact
from launch.config.schema import Recipe


class Kind(NamedTuple):
    """How a method is calibrated."""

    needs: Statistic
    decomposes: Decomposed


CALIBRATED = {  # the methods that a calibration is made for
    "astra": Kind("output", "output"),
    "pissa": Kind("weight", "matrix"),
    "milora": Kind("weight", "matrix"),
    "olora": Kind("weight", "matrix"),
    "corda": Kind("input", "matrix"),
    "eva": Kind("input", "input"),
    "lora_ga": Kind("gradient", "matrix"),
}
SCALED = ("pissa", "milora", "corda")  # whose factors depend on s = alpha / rank


def kind(recipe: Recipe) -> Kind:
    """How the recipe's method is calibrated; it is one of CALIBRATED."""
    if recipe.calibration.statistics == "reference":
        return Kind("scaled output", "output")
    return CALIBRATED[recipe.adapter.method]


def scaling(recipe: Recipe) -> float:
    """s = alpha / rank, alike for every module."""
    return recipe.adapter.alpha / recipe.adapter.rank


def variant(recipe: Recipe) -> str | None:
    """What a method's name alone leaves open, which is to stand beside it wherever results do; None if nothing."""
    match recipe.adapter.method:
        case "astra":
            reference = " reference" if recipe.calibration.statistics == "reference" else ""
            return recipe.adapter.eigen_select + reference
        case "corda":
            return recipe.adapter.corda_mode
        case _:
            return None


def finder(recipe: Recipe) -> Find:
    """What the recipe's calibration finds of a module: Astra's subspace, or the factors `a0` and `b0` themselves."""
    settings, seed, s = recipe.adapter, recipe.calibration.seed, scaling(recipe)
    if settings.method == "astra":
        return lambda problem: find_subspace(problem, settings.eigen_select, seed)

    def find(problem: Problem) -> Found:
        name, weight, _, rank, _, sums = problem
        match settings.method:
            case "pissa":
                a0, b0 = inits.pissa(weight, rank, s)
            case "milora":
                a0, b0 = inits.milora(weight, rank, s)
            case "olora":
                a0, b0 = inits.olora(weight, rank)
            case "corda":
                a0, b0 = inits.corda(weight, sums[0].second(), rank, s, settings.corda_mode)
            case "eva":
                a0, b0 = inits.eva(sums[0].covariance(), len(weight), rank, seed, name)
            case "lora_ga":
                a0, b0 = inits.lora_ga(sums[0].mean(), rank)
        return {"a0": a0, "b0": b0}

    return find


def initialiser(
    recipe: Recipe, source: Path | None, ranks: Mapping[str, int], device: torch.device
) -> Callable[[str, Tensor], tuple[Tensor, Tensor]]:
    """(module name, whole W) -> fp64 (A0, B0). Collective, in order of calls.

    Args:
        source: the folder of the calibration, for methods that need one. ranks: r of every module.
    """
    settings = recipe.adapter
    match settings.method:
        case "astra":
            select = settings.eigen_select
            return lambda name, weight: inits.astra(
                weight, artifact.read_subspace(source, name, ranks[name], select, device)
            )
        case "lora" | "rslora" | "dora":
            return lambda name, weight: inits.lora(weight, ranks[name], recipe.train.seed, name)
        case _:
            return lambda name, _: artifact.read_factors(source, name, ranks[name], device)
