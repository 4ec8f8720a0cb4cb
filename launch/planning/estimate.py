"""Estimate what a run takes, from the model's config alone: no weights, no GPU, nothing allocated.

launch.planning.model runs the model without numbers; memory, timing and communication say what
follows from it, and this module puts them together for one engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from astra.errors import AstraError
from astra.flops import count_solve_flops, count_sum_flops
from astra.windows import CalibrationPlan
from launch.config.schema import Recipe
from launch.planning.machine import Machine
from launch.planning.memory import (
    Stage,
    count_file_bytes,
    count_held_bytes,
    leave_out,
    make_calibration_stage,
    make_initialisation_stage,
    make_training_stage,
)
from launch.planning.model import (
    CalibrationBatch,
    ModelRun,
    make_fake_model,
    run_calibration_batch,
    run_without_numbers,
)
from launch.planning.timing import CalibrationTime, StepTime, time_calibration, time_step
from launch.runtime.compat.torch_parts import make_fake_mode, replace_tensors
from launch.runtime.units import GIB


@dataclass(frozen=True)
class Estimate:
    """What a run would take with one engine."""

    engine: str
    checkpointing: bool
    parameters: int  # of the base
    trainable: int
    calibration: Stage
    initialisation: Stage
    training: Stage
    windows: CalibrationPlan | None  # None: the method needs no calibration
    hidden_states: int  # bytes on the CPU, on each rank, carried from window to window
    sum_flops: float  # fp64, of the calibration's sums, over all ranks
    solve_flops: float  # fp64, of its eigenproblems on GPUs, over all ranks
    files: dict[str, int]  # bytes by what they hold
    steps: int  # of the optimiser
    step_time: StepTime
    calibration_time: CalibrationTime | None  # None: as windows

    def get_stages(self) -> dict[str, Stage]:
        """Return the stages by name, in the order in which they run."""
        return {
            "calibration": self.calibration,
            "initialisation": self.initialisation,
            "training": self.training,
        }

    @property
    def peak(self) -> int:
        """Bytes on each rank at the largest stage's peak."""
        return max(stage.peak for stage in self.get_stages().values())

    @property
    def seconds(self) -> float:
        """Of calibration and training, without loading, saving and scoring."""
        calibration = self.calibration_time.seconds if self.calibration_time else 0.0
        return calibration + self.steps * self.step_time.seconds


@dataclass(frozen=True)
class CalibrationNeeds:
    """What a calibration takes on each rank, whatever its windows are, and how to plan them."""

    held_bytes: int  # of the model, with what its engine gathers
    batch: CalibrationBatch

    @property
    def taken_bytes(self) -> int:
        """Of the model and a pass, beside what the calibration may add."""
        return self.held_bytes + self.batch.once.peak


def estimate_run(
    config: PretrainedConfig,
    recipe: Recipe,
    machine: Machine,
    *,
    dtype: torch.dtype,
    checkpointing: bool,
    steps: int,
    head: Sequence[str] = (),
) -> Estimate:
    """Estimate what `recipe` takes with a model of `config` on `machine`, with its engine.

    Args:
        dtype: of the base.
        checkpointing: whether activations are computed again for the backward pass.
        steps: of the optimiser.
        config, head: see `make_fake_model`.

    Raises:
        AstraError: targets, ranks or calibration.memory_gib do not fit the model.
    """
    wanted = [checkpointing]
    run = run_without_numbers(config, recipe, dtype, machine.world_size, wanted, head)
    return estimate_engine(run, recipe, recipe.engine, machine, checkpointing, steps)


def estimate_engine(
    run: ModelRun,
    recipe: Recipe,
    engine: str,
    machine: Machine,
    checkpointing: bool,
    steps: int,
) -> Estimate:
    """Estimate what `recipe` takes with `engine`; see `estimate_run`."""
    fake, batch = run.fake, run.calibration
    node_size = _get_node_size(recipe, machine)
    held = count_held_bytes(engine, fake, machine.world_size, node_size)
    windows, flops, sum_flops, solve_flops, calibration_time = None, 0.0, 0.0, 0.0, None
    if batch is not None:
        windows = _plan_windows(make_needs(held, batch), recipe, machine)
        # Hidden states are carried from window to window; gradients are not.
        num_passes = len(windows.windows) if batch.has_backward else 1
        num_samples = recipe.calibration.samples if batch.once.flops else 0
        flops = num_passes * batch.once.flops / recipe.calibration.batch_size * num_samples
        sum_flops = _count_sum_flops(fake.linears, batch, num_samples * recipe.data.max_length)
        solve_flops = _count_solve_flops(fake.linears, batch, recipe)
        statistics = sum(window.sums_bytes for window in windows.windows)
        calibration_time = time_calibration(
            run,
            recipe,
            engine,
            machine,
            num_passes,
            sum_flops,
            statistics,
            in_nodes=node_size is not None,
        )
    micro = run.training[checkpointing]
    training_flops = steps * micro.flops / run.micro_batch * recipe.train.global_batch
    is_split = windows is not None and windows.layers is not None
    return Estimate(
        engine=engine,
        checkpointing=checkpointing,
        parameters=fake.num_parameters,
        trainable=fake.num_trained,
        calibration=make_calibration_stage(held, windows, batch.once.peak if batch else 0, flops),
        initialisation=make_initialisation_stage(held, fake.linears, fake.dtype),
        training=make_training_stage(held, micro.peak, training_flops),
        windows=windows,
        hidden_states=batch.hidden_states if is_split else 0,
        sum_flops=sum_flops,
        solve_flops=solve_flops,
        files=count_file_bytes(recipe, fake),
        steps=steps,
        step_time=time_step(run, engine, checkpointing, machine, node_size is not None),
        calibration_time=calibration_time,
    )


def _get_node_size(recipe: Recipe, machine: Machine) -> int | None:
    """Return the ranks of a node, if each of several nodes holds the base (`shard_within: node`).

    Raises:
        AstraError: the nodes differ in their number of ranks, or have one each.
    """
    if recipe.shard_within == "all" or machine.num_nodes == 1:
        return None
    if machine.world_size % machine.node_size or machine.node_size == 1:
        raise AstraError(
            "shard_within: node needs equally many ranks on every node, at least two, not "
            f"{machine.world_size} ranks in nodes of {machine.node_size}; set shard_within=all"
        )
    return machine.node_size


def _count_sum_flops(linears: dict, batch: CalibrationBatch, num_tokens: int) -> int:
    """Count the fp64 operations of a calibration's sums: per token and group, times the tokens."""
    return num_tokens * sum(count_sum_flops(group, linears) for group in batch.groups)


def _count_solve_flops(linears: dict, batch: CalibrationBatch, recipe: Recipe) -> int:
    """Count the fp64 operations that solve all modules on GPUs (astra.flops)."""
    lora_ranks = dict.fromkeys(linears, recipe.adapter.rank)
    decomposition = recipe.adapter.method_record.decomposition
    return sum(
        count_solve_flops(group, linears, lora_ranks, decomposition, "cuda")
        for group in batch.groups
    )


def make_needs(held: dict[str, int], batch: CalibrationBatch) -> CalibrationNeeds:
    """Return what a calibration takes beside what nothing trains yet."""
    return CalibrationNeeds(sum(leave_out(held, "gradients and optimiser").values()), batch)


def estimate_calibration_needs(
    config: PretrainedConfig,
    recipe: Recipe,
    dtype: torch.dtype,
    world_size: int,
    node_size: int | None = None,
    head: Sequence[str] = (),
) -> CalibrationNeeds:
    """Estimate what the recipe's calibration takes on each of `world_size` ranks.

    See `estimate_run`. Takes a second for a model of 32 layers.

    Args:
        node_size: see `count_held_bytes`.
        config, head: see `make_fake_model`.
    """
    fake = make_fake_model(config, recipe, dtype, head)
    with make_fake_mode():
        replace_tensors(fake.model)
        batch = run_calibration_batch(fake, recipe, world_size)
    return make_needs(count_held_bytes(recipe.engine, fake, world_size, node_size), batch)


def _plan_windows(needs: CalibrationNeeds, recipe: Recipe, machine: Machine) -> CalibrationPlan:
    """Plan the windows within calibration.memory_gib.

    With `auto` that follows from the GPUs' memory; windows are then at least one layer, whether it
    fits or not, and without the GPUs' memory there is one window.
    """
    memory_gib, plan_windows = recipe.calibration.memory_gib, needs.batch.plan_windows
    if memory_gib != "auto":
        return plan_windows(memory_gib)
    if machine.usable is None:
        return plan_windows(None)
    try:
        return plan_windows(max(0.0, machine.usable - needs.taken_bytes) / GIB)
    except AstraError:
        return plan_windows(None)  # the verdict is that it does not fit
