"""Decide `engine: auto` and `train.gradient_checkpointing: auto` before the model is loaded.

Once for a run: a run that resumes takes again what its checkpoint recorded.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from launch.config.schema import Recipe
from launch.data.inputs import Inputs
from launch.models.check import make_meta_model, read_config
from launch.planning.engines import (
    compare_engines,
    estimate_auto,
    fits,
    list_checkpointing,
    list_engines,
    recommend_engine,
    settle_checkpointing,
)
from launch.planning.machine import DEFAULT_GPU, RESERVE, Machine, make_machine
from launch.planning.memory import is_offloaded
from launch.planning.model import ModelRun, run_without_numbers, try_estimate
from launch.runtime.distributed import find_nodes, print_rank0, run_on_rank0
from launch.runtime.gpus import find_gpu
from launch.runtime.memory import measure_free_memory
from launch.runtime.units import GIB

ENGINE, CHECKPOINTING = "engine", "train.gradient_checkpointing"
Decided = tuple[dict[str, Any], list[str]]  # field -> its value, and lines to print


def decide_run(
    recipe: Recipe, inputs: Inputs, device: torch.device, recorded: Mapping[str, Any]
) -> tuple[Recipe, dict[str, Any]]:
    """Give `engine` and gradient checkpointing values where they are `auto`. Collective.

    On GPUs launch/plan.py's estimate decides, for the least free memory and the slowest GPU of any
    rank. On CPUs checkpointing is off, and the engine is the simplest that fits: speeds there are
    not known. Checkpointing is off too where transformers has none for the base.

    Args:
        recorded: what the run's checkpoint says was decided, which is taken again; empty at a run's
            beginning.

    Returns:
        The recipe with the values, and by the fields' names the values to be recorded. The recipe
        as it is, and nothing, where there is nothing to be decided.

    Raises:
        UserError: the recipe turns checkpointing on, and transformers has none for the base.
    """
    recipe, settled = _settle_checkpointing(recipe, inputs)
    wanted = {ENGINE: recipe.engine, CHECKPOINTING: recipe.train.gradient_checkpointing}
    open_fields = {field for field, value in wanted.items() if value == "auto"}
    decided = {field: recorded[field] for field in sorted(open_fields & recorded.keys())}
    engines = list_engines(recipe, dist.get_world_size())
    if decided.get(ENGINE, engines[0]) not in engines:
        print_rank0(f"{ENGINE}: {decided.pop(ENGINE)}, as this run was begun with, cannot train it")
    for field, value in decided.items():
        print_rank0(f"{field}: auto stays {_format(value)}, as this run was begun with")
    recipe = _apply(recipe, decided)
    if open_fields - decided.keys():
        found, lines = _decide_now(recipe, inputs, device)
        for line in lines:
            print_rank0(line)
        recipe, decided = _apply(recipe, found), decided | found
    return recipe, settled | decided


def _settle_checkpointing(recipe: Recipe, inputs: Inputs) -> tuple[Recipe, dict[str, Any]]:
    """Turn checkpointing off where it is `auto` and the base's class has none. Collective.

    Returns:
        As `decide_run`. Raises UserError where the recipe turns it on.
    """
    if recipe.train.gradient_checkpointing is False:
        return recipe, {}

    def settle() -> Recipe:
        model = make_meta_model(read_config(inputs.model_path, head=inputs.head))
        return settle_checkpointing(recipe, model)

    settled = run_on_rank0(settle)
    if settled == recipe:
        return recipe, {}
    print_rank0(f"{CHECKPOINTING}: auto is false, as transformers has none for this base")
    return settled, {CHECKPOINTING: False}


def _apply(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return the recipe with decided values."""
    changes: dict[str, Any] = {}
    if ENGINE in values:
        changes["engine"] = values[ENGINE]
    if CHECKPOINTING in values:
        update = {"gradient_checkpointing": values[CHECKPOINTING]}
        changes["train"] = recipe.train.model_copy(update=update)
    return recipe.model_copy(update=changes)


def _decide_now(recipe: Recipe, inputs: Inputs, device: torch.device) -> Decided:
    """Decide what is still `auto` in `recipe`. Collective."""
    found, lines = {}, []
    if device.type == "cpu" and recipe.train.gradient_checkpointing == "auto":
        found, lines = {CHECKPOINTING: False}, [f"{CHECKPOINTING}: auto is false on CPUs"]
        recipe = _apply(recipe, found)
        if recipe.engine != "auto":
            return found, lines
    machine = gather_machine(device)
    more, more_lines = run_on_rank0(lambda: _decide_on(recipe, inputs, machine, device.type))
    return found | more, lines + more_lines


def gather_machine(device: torch.device) -> Machine:
    """Return what all ranks have: the least free memory, and the slowest GPU. Collective.

    A GPU that is not in the table counts as slowest.
    """
    free = measure_free_memory(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (free, name))
    least = min(free for free, _ in ranks)
    slowest = min((name for _, name in ranks), key=_rank_by_speed)
    node_size = max(map(len, find_nodes()))
    machine = make_machine(slowest, len(ranks), memory=least / GIB, node_size=node_size)
    # What the libraries take is no longer free.
    return replace(machine, usable=(1 - RESERVE) * least)


def _rank_by_speed(name: str) -> float:
    gpu = find_gpu(name)
    return 0.0 if gpu is None else gpu.bf16_tflops or gpu.fp32_tflops


def _decide_on(recipe: Recipe, inputs: Inputs, machine: Machine, device_type: str) -> Decided:
    """Decide what is still `auto` for `machine`. Rank 0 calls it.

    Without an estimate it is what shards most, with checkpointing on GPUs.
    """
    config, head = read_config(inputs.model_path, head=inputs.head), inputs.model.head_parameters
    wanted, size = list_checkpointing(recipe), machine.world_size
    run, problem = try_estimate(
        lambda: run_without_numbers(config, recipe, inputs.dtype, size, wanted, head)
    )
    if run is None:
        return _decide_blindly(recipe, machine, problem)
    if device_type == "cpu":
        return _decide_cpu_engine(run, recipe, machine)
    return _decide_on_gpus(run, recipe, machine)


def _decide_blindly(recipe: Recipe, machine: Machine, reason: str) -> Decided:
    """Decide without an estimate."""
    found: dict[str, Any] = {}
    if recipe.engine == "auto":
        engines = list_engines(recipe, machine.world_size)
        order = ("single", "zero3", "fsdp")  # the default, where there are several ranks
        found[ENGINE] = next(engine for engine in order if engine in engines)
    if recipe.train.gradient_checkpointing == "auto":
        found[CHECKPOINTING] = True
    lines = [
        f"{field}: auto is {_format(value)}, as there is no estimate: {reason}"
        for field, value in found.items()
    ]
    return found, lines


def _decide_cpu_engine(run: ModelRun, recipe: Recipe, machine: Machine) -> Decided:
    """Choose the simplest engine that fits into the ranks' shares of main memory."""
    engines = [name for name in list_engines(recipe, machine.world_size) if not is_offloaded(name)]
    estimates = [estimate_auto(run, recipe, name, machine, 1) for name in engines]
    fitting = [estimate for estimate in estimates if fits(estimate, machine)]
    chosen = fitting[0] if fitting else min(estimates, key=lambda estimate: estimate.peak)
    which = "the simplest that fits" if fitting else "which takes least, as none fits"
    line = (
        f"{ENGINE}: auto is {chosen.engine}, {which}: {chosen.peak / GIB:.3g} of "
        f"{machine.usable / GIB:.3g} GiB on each rank; speeds of engines on CPUs are not known"
    )
    return {ENGINE: chosen.engine}, [line]


def _decide_on_gpus(run: ModelRun, recipe: Recipe, machine: Machine) -> Decided:
    """Choose the engine that launch/plan.py recommends, and checkpointing where it is needed."""
    found: dict[str, Any] = {}
    lines = []
    room = f"{machine.usable / GIB:.3g} GiB, the least that is free on a rank less {RESERVE:.0%}"
    if recipe.engine == "auto":
        estimates = compare_engines(run, recipe, machine, 1)
        recommended = recommend_engine(estimates, machine)
        chosen = recommended.estimate
        found[ENGINE] = chosen.engine
        unknown = ""
        if not machine.is_known:
            unknown = f"; {machine.name} is not known, and an {DEFAULT_GPU}'s rates are taken"
        lines.append(
            f"{ENGINE}: auto is {chosen.engine}, by the plan for {room}: {recommended.reason}"
            f"{unknown}"
        )
    else:
        chosen = estimate_auto(run, recipe, recipe.engine, machine, 1)
    if recipe.train.gradient_checkpointing == "auto":
        found[CHECKPOINTING] = chosen.checkpointing
        without = _estimate_without(run, recipe, chosen.engine, machine)
        verb = "would take" if chosen.checkpointing else "takes"
        lines.append(
            f"{CHECKPOINTING}: auto is {_format(chosen.checkpointing)}: without it a step {verb} "
            f"{without / GIB:.3g} of {room}"
        )
    return found, lines


def _estimate_without(run: ModelRun, recipe: Recipe, engine: str, machine: Machine) -> int:
    """Return the bytes of a step without gradient checkpointing on each rank."""
    plain = recipe.train.model_copy(update={"gradient_checkpointing": False})
    plain_recipe = recipe.model_copy(update={"train": plain})
    return estimate_auto(run, plain_recipe, engine, machine, 1).training.peak


def _format(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
