"""Print what a run would take, whether it fits, and which engine suits it."""

import sys
import warnings

import torch
from transformers import PretrainedConfig

from launch.calibration.solvers import GPU_EFFICIENCY
from launch.config.schema import Recipe
from launch.data.inputs import resolve_dtype
from launch.data.order import count_steps
from launch.models.check import check_max_length, make_meta_model, refuse_quantised
from launch.models.files import fetch_config
from launch.models.head import Head, find_outer_names, set_head
from launch.planning.engines import (
    compare_engines,
    estimate_auto,
    fits,
    list_checkpointing,
    recommend_engine,
    render_comparison,
    settle_checkpointing,
)
from launch.planning.estimate import Estimate
from launch.planning.machine import Machine, describe_machine
from launch.planning.model import run_without_numbers, try_estimate
from launch.planning.options import PlanOptions
from launch.quickstart import base as quickstart
from launch.quickstart.data import NUM_TRAIN_PROBLEMS
from launch.run.provenance import name_dtype
from launch.runtime.errors import UserError
from launch.runtime.units import GIB
from launch.training.trainable import check_and_describe_trainable


def print_plan(recipe: Recipe, options: PlanOptions) -> bool:
    """Print memory, arithmetic, time and files of a run, and compare the engines.

    Returns:
        Whether the run fits into the GPUs' memory; True where that is not given.

    Raises:
        UserError: a field or an option does not allow a plan.
        AstraError: targets, ranks or calibration.memory_gib do not fit the model.
    """
    # From inside transformers, at every call.
    warnings.filterwarnings("ignore", category=FutureWarning)
    machine = options.machine
    if recipe.engine == "single" and machine.world_size > 1:
        raise UserError(
            f"engine: single trains in one process, not {machine.world_size}; set engine=zero3 or "
            "--gpus 1"
        )
    config = _load_config(recipe)
    model = make_meta_model(config)  # refuses what cannot be made, before anything is printed
    recipe = settle_checkpointing(recipe, model)
    # A pooler in the base is taken to be in its files, as BERT's is.
    head = find_outer_names(model) if recipe.task.has_head else ()
    check_max_length(recipe.data.max_length, config, recipe.model.name)
    steps = count_planned_steps(recipe, options)
    dtype = resolve_dtype(recipe.model.dtype, on_bf16_gpu=True)
    name = recipe.model.name
    print(f"planning {name}: running its layers without numbers", file=sys.stderr, flush=True)
    wanted = list_checkpointing(recipe)
    run, problem = try_estimate(
        lambda: run_without_numbers(config, recipe, dtype, machine.world_size, wanted, head)
    )
    if run is None:
        raise UserError(
            f"model.name: {name} cannot be planned, as its {type(model).__name__} does not run "
            f"without values: {problem}; train.py needs no plan"
        )
    estimates = compare_engines(run, recipe, machine, steps)
    recommended = recommend_engine(estimates, machine)
    estimate = recommended.estimate
    if recipe.engine != "auto":
        estimate = estimates.get(recipe.engine)
        estimate = estimate or estimate_auto(run, recipe, recipe.engine, machine, steps)
    in_nodes = recipe.shard_within == "node" and machine.num_nodes > 1
    layout = ", each node holds the base" if in_nodes else ""
    print(
        f"{name}, {estimate.engine} on {machine.world_size} ranks{layout}, {name_dtype(dtype)} base, "
        f"gradient checkpointing {'on' if estimate.checkpointing else 'off'}"
    )
    print(
        f"parameters: {estimate.parameters / 1e9:.3f} B of the base, "
        f"{estimate.trainable / 1e6:.2f} M trainable"
    )
    print(check_and_describe_trainable(config, recipe.adapter, head))
    print(describe_machine(machine))
    if dtype == torch.bfloat16 and machine.gpu.bf16_tflops is None:
        print("  no bf16 in hardware: its products are taken at fp32's rate, which is a best case")
    _print_memory(estimate)
    _print_time(estimate, machine)
    print("\nfiles, GiB:")
    for contents, size in estimate.files.items():
        print(f"  {size / GIB:8.3g}  {contents}")
    print(f"\nengines, for a step of {recipe.train.global_batch} examples:")
    print(render_comparison(estimates, machine))
    print(f"recommended: engine={recommended.estimate.engine}: {recommended.reason}")
    return _print_verdict(estimate, machine)


def _load_config(recipe: Recipe) -> PretrainedConfig:
    """Load the config of the base, for its new head if the task has one.

    The quickstart's is known before the base is pretrained. Raises UserError.
    """
    if recipe.model.name == quickstart.NAME:
        config = quickstart.make_config()
    else:
        config = fetch_config(recipe.model.name, recipe.model.revision)
    refuse_quantised(config)
    # The tokenizer is not fetched. Which token pads rows changes no shape.
    pad_token = config.get_text_config().pad_token_id or 0
    head = Head(tuple(recipe.task.labels), pad_token) if recipe.task.has_head else None
    set_head(config, head)
    return config


def count_planned_steps(recipe: Recipe, options: PlanOptions) -> int:
    """Count the optimiser steps.

    Raises:
        UserError: the number of rows is unknown, or all of them are held out.
    """
    data, settings = recipe.data, recipe.train
    counts = [options.num_rows, data.num_rows]
    if data.path == quickstart.NAME:
        counts.append(NUM_TRAIN_PROBLEMS)
    known = [count for count in counts if count is not None]
    if not known:
        if settings.max_steps is None:
            raise UserError(
                "--rows: how many rows there are; the recipe sets neither data.limit, the counts of "
                "data.sources nor max_steps"
            )
        return settings.max_steps
    num_rows = min(known)
    if not data.sources:  # a mix holds out rows beside those that it trains on
        if data.held_out >= num_rows:
            raise UserError(
                f"data.held_out: {data.held_out} of {num_rows} rows leave none to train on; lower it"
            )
        num_rows -= data.held_out
    return count_steps(num_rows, settings.global_batch, settings.epochs, settings.max_steps)


def _print_memory(estimate: Estimate) -> None:
    """Print the memory of each GPU by stage, and the windows of the calibration."""
    print("\nmemory of each GPU in GiB, at the stage's peak:")
    for name, stage in estimate.get_stages().items():
        parts = ", ".join(f"{part} {size / GIB:.3g}" for part, size in stage.memory.items() if size)
        print(f"  {name:<15} {stage.peak / GIB:8.3g}  = {parts}")
    if estimate.windows:
        print(f"\n{estimate.windows.describe()}")
    if estimate.hidden_states:
        print(
            f"hidden states between windows: {estimate.hidden_states / GIB:.3g} GiB on the CPU, "
            "on each rank"
        )


def _print_time(estimate: Estimate, machine: Machine) -> None:
    """Print the floating-point operations over all ranks, and the time of each stage."""
    print(
        f"\nfloating-point operations, and time with {machine.efficiency:.0%} of the peaks "
        f"({GPU_EFFICIENCY:.0%} in fp64), without loading, saving and scoring:"
    )
    if estimate.calibration_time is not None:
        time = estimate.calibration_time
        _print_stage("calibration, passes", estimate.calibration.flops, time.passes)
        _print_stage("calibration, sums (fp64)", estimate.sum_flops, time.sums)
        _print_stage("calibration, adding up", None, time.reduction, "over the ranks")
        _print_stage("calibration, solving (fp64)", estimate.solve_flops, time.solving, time.solver)
    step = estimate.step_time
    parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in step.micro_batch.items())
    _print_stage(
        f"training, {estimate.steps:>7} steps",
        estimate.training.flops,
        estimate.steps * step.seconds,
        f"bound by the {step.bound}",
    )
    print(
        f"  a step takes {step.seconds:.3g} s: {step.num_micro_batches} micro batches at the slowest "
        f"of {parts} s, and {step.after:.2g} s for the optimiser"
    )
    hours = estimate.seconds / 3600
    print(f"  in all {hours:.3g} h, {hours * machine.world_size:.3g} GPU hours")


def _print_stage(label: str, flops: float | None, seconds: float, remark: str = "") -> None:
    """Print a stage's operations and time in a row."""
    count = " " * 10 if flops is None else f"{flops:10.3e}"
    print(f"  {label:<28} {count}  {_format_time(seconds)}  {remark}".rstrip())


def _format_time(seconds: float) -> str:
    """Return a time in hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:3d} h {minutes:02d} min {seconds:02d} s"


def _print_verdict(estimate: Estimate, machine: Machine) -> bool:
    """Print whether the run fits, and if not what would make it fit."""
    if machine.usable is None:
        return True
    peak, usable = estimate.peak / GIB, machine.usable / GIB
    if fits(estimate, machine):
        print(f"\n{estimate.engine} fits: at most {peak:.3g} of the {usable:.3g} GiB to be filled")
        return True
    stages = estimate.get_stages()
    short = [name for name, stage in stages.items() if stage.peak > machine.usable]
    advice = _suggest_change(estimate, short, machine.usable)
    print(
        f"\n{estimate.engine} does not fit in {machine.memory:g} GiB, of which {usable:.3g} are to "
        f"be filled: {', '.join(short)}; {advice}"
    )
    return False


def _suggest_change(estimate: Estimate, short: list[str], usable: float) -> str:
    """Return what would make the stages `short` fit."""
    if short == ["calibration"]:
        others = estimate.calibration.peak - estimate.windows.peak_bytes
        left = usable - max(others, 0)
        if left > estimate.windows.working_bytes:  # else even one layer does not fit
            return f"set calibration.memory_gib={int(left / GIB * 10) / 10}"
    return (
        "more GPUs, another engine, a smaller train.micro_batch or data.max_length, or a smaller "
        "rank"
    )
