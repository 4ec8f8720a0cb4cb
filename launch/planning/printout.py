"""Print what a run would take, and whether it fits."""

import math
import sys
import warnings

import torch
from transformers import PretrainedConfig

from launch.config.schema import Recipe
from launch.data.inputs import resolve_dtype
from launch.data.order import count_steps
from launch.models.check import check_config, check_max_length
from launch.models.files import fetch_config
from launch.planning.estimate import Estimate, estimate_run
from launch.planning.options import PlanOptions
from launch.quickstart import base as quickstart
from launch.quickstart.data import NUM_TRAIN_PROBLEMS
from launch.run.provenance import dtype_name
from launch.runtime.errors import UserError
from launch.runtime.gpus import SLOW_FP64_TFLOPS
from launch.runtime.units import GIB
from launch.training.trainable import describe_trainable


def print_plan(recipe: Recipe, options: PlanOptions) -> bool:
    """Print memory, arithmetic, time and files of a run.

    Returns:
        Whether the run fits into the GPUs' memory; True where that is not given.

    Raises:
        UserError: a field or an option does not allow a plan.
        AstraError: targets, ranks or calibration.memory_gib do not fit the model.
    """
    # From inside transformers, at every call.
    warnings.filterwarnings("ignore", category=FutureWarning)
    if recipe.engine == "single" and options.world_size > 1:
        raise UserError(
            f"engine: single trains in one process, not {options.world_size}; set engine=zero3 or "
            "--gpus 1"
        )
    if recipe.task.has_head:
        raise UserError(
            f"task.kind: plans are for causal tasks, not for {recipe.task.kind}; as a bound, plan "
            "a decoder's recipe without its task section"
        )
    config = _load_config(recipe)
    check_config(config)
    check_max_length(recipe.data.max_length, config, recipe.model.name)
    steps = _count_steps(recipe, options)
    dtype = resolve_dtype(recipe.model.dtype, torch.device("cuda"))
    name = recipe.model.name
    print(f"planning {name}: running its layers without numbers", file=sys.stderr, flush=True)
    estimate = estimate_run(
        config,
        recipe,
        world_size=options.world_size,
        dtype=dtype,
        checkpointing=recipe.train.gradient_checkpointing is not False,
        steps=steps,
        gpu_memory=options.gpu_memory,
    )
    print(f"{name}, {recipe.engine} on {options.world_size} ranks, {dtype_name(dtype)} base")
    print(
        f"parameters: {estimate.parameters / 1e9:.3f} B of the base, "
        f"{estimate.trainable / 1e6:.2f} M trainable"
    )
    print(describe_trainable(config, recipe.adapter))
    _print_memory(estimate)
    _print_arithmetic(estimate, steps, options)
    print("\nfiles, GiB:")
    for contents, size in estimate.files.items():
        print(f"  {size / GIB:8.3g}  {contents}")
    return _print_verdict(estimate, options)


def _load_config(recipe: Recipe) -> PretrainedConfig:
    """Load the config of the base. The quickstart's is known before the base is pretrained."""
    if recipe.model.name == quickstart.NAME:
        return quickstart.make_config()
    return fetch_config(recipe.model.name, recipe.model.revision)


def _count_steps(recipe: Recipe, options: PlanOptions) -> int:
    """Count the optimiser steps. Raises UserError if the number of training rows is unknown."""
    settings = recipe.train
    num_rows = options.num_rows or recipe.data.limit
    if num_rows is None and recipe.model.name == quickstart.NAME:
        num_rows = NUM_TRAIN_PROBLEMS
    if num_rows is None:
        if settings.max_steps is None:
            raise UserError(
                "--rows: how many training rows there are; the recipe sets neither data.limit nor "
                "max_steps"
            )
        return settings.max_steps
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


def _print_arithmetic(estimate: Estimate, steps: int, options: PlanOptions) -> None:
    """Print the floating-point operations over all ranks, and the time that they take."""
    rate, fp64_rate = (
        tflops * options.efficiency * 1e12 * options.world_size
        for tflops in (options.tflops, options.fp64_tflops)
    )
    peaks = f"{options.tflops:g} and {options.fp64_tflops:g} TFLOP/s"
    print(f"\nfloating-point operations, and time at {options.efficiency:.0%} of {peaks}:")
    lines = {
        "calibration, forward passes": (estimate.calibration.flops, rate),
        "calibration, sums (fp64)": (estimate.sum_flops, fp64_rate),
        "calibration, solving (fp64)": (estimate.solve_flops, fp64_rate),
        f"training, {steps:>7} steps": (estimate.training.flops, rate),
    }
    for label, (flops, flops_per_second) in lines.items():
        print(f"  {label:<29} {flops:10.3e}  {_format_time(flops / flops_per_second)}")
    if options.fp64_tflops < SLOW_FP64_TFLOPS and estimate.solve_flops:
        # Both sides are shared by the ranks.
        cores = estimate.solve_core_seconds / (estimate.solve_flops / fp64_rate)
        cores = math.ceil(cores / options.world_size)
        print(
            f"GPUs this slow in fp64 leave the solving to CPUs with {cores} cores or more a rank, "
            "which are sooner"
        )


def _format_time(seconds: float) -> str:
    """Return a time in hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:3d} h {minutes:02d} min {seconds:02d} s"


def _print_verdict(estimate: Estimate, options: PlanOptions) -> bool:
    """Print whether the run fits, and if not what would make it fit."""
    if options.gpu_memory is None:
        return True
    stages = estimate.get_stages()
    short = [name for name, stage in stages.items() if stage.peak > options.gpu_memory * GIB]
    if not short:
        peak = max(stage.peak for stage in stages.values())
        print(f"\nit fits: at most {peak / GIB:.3g} of {options.gpu_memory:g} GiB")
        return True
    advice = _suggest_change(estimate, short, options.gpu_memory)
    print(f"\nit does not fit in {options.gpu_memory:g} GiB: {', '.join(short)}; {advice}")
    return False


def _suggest_change(estimate: Estimate, short: list[str], gpu_memory: float) -> str:
    """Return what would make the stages `short` fit."""
    if short == ["calibration"]:
        others = estimate.calibration.peak - estimate.windows.peak_bytes
        left = gpu_memory * GIB - max(others, 0)
        if left > estimate.windows.working_bytes:  # else even one layer does not fit
            return f"set calibration.memory_gib={int(left / GIB * 10) / 10}"
    return (
        "more GPUs, engine=fsdp or zero3, a smaller train.micro_batch or data.max_length, or a "
        "smaller rank"
    )
