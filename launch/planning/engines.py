"""Compare the engines for a run, and recommend one with the reason."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from launch.config.schema import Recipe
from launch.planning.estimate import Estimate, estimate_engine
from launch.planning.machine import Machine
from launch.planning.memory import is_offloaded
from launch.planning.model import ModelRun
from launch.runtime.errors import UserError
from launch.runtime.units import GIB

# The simplest first: of engines that are equally fast the first is taken.
ENGINES = ("single", "zero2", "fsdp", "zero3", "zero3_offload")
EQUAL = 1.02  # times that differ by less are equal: no estimate is better


@dataclass(frozen=True)
class Recommendation:
    """An engine, and why."""

    estimate: Estimate
    reason: str  # a sentence's second half


def list_engines(recipe: Recipe, world_size: int) -> list[str]:
    """List the engines that can train `recipe` on `world_size` ranks, the simplest first."""
    engines = list(ENGINES)
    if world_size > 1:
        engines.remove("single")  # it trains in one process
    if recipe.shard_within == "node":  # for which the recipe allows no others
        engines = [engine for engine in engines if engine in ("fsdp", "zero3")]
    if recipe.train.compile:  # which zero3 does not allow: it gathers weights inside the layers
        engines = [engine for engine in engines if not engine.startswith("zero3")]
    return engines


def settle_checkpointing(recipe: Recipe, model: PreTrainedModel) -> Recipe:
    """Return the recipe with gradient checkpointing off if it is `auto` and `model` has none.

    Raises:
        UserError: the recipe turns it on.
    """
    wanted = recipe.train.gradient_checkpointing
    if model.supports_gradient_checkpointing or wanted is False:
        return recipe
    if wanted is True:
        raise UserError(
            f"train.gradient_checkpointing: {type(model).__name__} of transformers has none; set "
            "false"
        )
    train = recipe.train.model_copy(update={"gradient_checkpointing": False})
    return recipe.model_copy(update={"train": train})


def list_checkpointing(recipe: Recipe) -> list[bool]:
    """List the values that train.gradient_checkpointing may take, the faster one first."""
    wanted = recipe.train.gradient_checkpointing
    return [False, True] if wanted == "auto" else [wanted]


def estimate_auto(
    run: ModelRun, recipe: Recipe, engine: str, machine: Machine, steps: int
) -> Estimate:
    """Estimate `engine` with the gradient checkpointing that the recipe has there.

    `auto` is on only where a step without it would not fit. Where memory is not known it is on.

    Raises:
        AstraError: calibration.memory_gib does not fit the model.
    """
    *others, last = [
        estimate_engine(run, recipe, engine, machine, checkpointing, steps)
        for checkpointing in list_checkpointing(recipe)
    ]
    for estimate in others:
        if machine.usable is not None and estimate.training.peak <= machine.usable:
            return estimate
    return last


def compare_engines(
    run: ModelRun, recipe: Recipe, machine: Machine, steps: int
) -> dict[str, Estimate]:
    """Estimate every engine that can train `recipe` on `machine`; see `estimate_auto`."""
    return {
        engine: estimate_auto(run, recipe, engine, machine, steps)
        for engine in list_engines(recipe, machine.world_size)
    }


def recommend_engine(estimates: dict[str, Estimate], machine: Machine) -> Recommendation:
    """Recommend the engine with the shortest step of those that fit; the simplest of equal ones.

    Where none fits it is the one that takes least memory.
    """
    fitting = {name: one for name, one in estimates.items() if fits(one, machine)}
    if not fitting:
        least = min(estimates.values(), key=lambda one: one.peak)
        return Recommendation(least, f"none fits, and it takes least: {_say_peak(least)}")
    best = min(one.step_time.seconds for one in fitting.values())
    equal = [one for one in fitting.values() if one.step_time.seconds <= best * EQUAL]
    chosen = equal[0]
    step = f"{chosen.step_time.seconds:.3g} s, bound by the {chosen.step_time.bound}"
    slower = [one for one in fitting.values() if one not in equal]
    if len(equal) > 1:
        reason = f"it is the simplest of {len(equal)} with equally short steps, {step}"
    elif slower:
        second = min(slower, key=lambda one: one.step_time.seconds)
        reason = f"its step is the shortest, {step}; {second.engine}'s takes "
        reason += f"{second.step_time.seconds:.3g} s"
    else:
        reason = f"no other fits; its step takes {step}"
    if machine.usable is not None:
        reason = f"it fits ({_say_peak(chosen)}), and {reason}"
    return Recommendation(chosen, reason)


def fits(estimate: Estimate, machine: Machine) -> bool:
    """Return whether every stage fits; True where the GPUs' memory is not known."""
    return machine.usable is None or estimate.peak <= machine.usable


def _say_peak(estimate: Estimate) -> str:
    return f"{estimate.peak / GIB:.3g} GiB"


def render_comparison(estimates: dict[str, Estimate], machine: Machine) -> str:
    """Return a table of the engines, for a console."""
    head = ("engine", "checkpointing", "fits", "GiB a GPU", "s a step", "bound by")
    lines = ["  " + _pad_cells(head)]
    for name, estimate in estimates.items():
        verdict = "?"
        if machine.usable is not None:
            verdict = "yes" if fits(estimate, machine) else "no"
        cells = (
            name + (" (CPU memory)" if is_offloaded(name) else ""),
            "on" if estimate.checkpointing else "off",
            verdict,
            f"{estimate.peak / GIB:.3g}",
            f"{estimate.step_time.seconds:.3g}",
            estimate.step_time.bound,
        )
        lines.append("  " + _pad_cells(cells))
    return "\n".join(lines)


def _pad_cells(cells: tuple[str, ...]) -> str:
    widths = (26, 14, 5, 10, 9, 8)
    padded = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)]
    return " ".join(padded).rstrip()
