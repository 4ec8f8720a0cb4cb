"""Estimate what a run takes, from the model's config alone: no weights, no GPU, nothing allocated.

One calibration batch and one micro batch really run, on PyTorch's fake tensors, which have shapes
and no memory. The bytes alive at the peak and the matrix products are counted while the run's own
code makes them. Every example is taken to be data.max_length tokens long.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from astra.adapter import get_base_layers
from astra.errors import AstraError
from astra.flops import count_solve_flops, count_sum_flops
from astra.gradients import sum_gradients
from astra.moments import Group, find_groups, run_forward
from astra.windows import FP64_BYTES, CalibrationPlan, find_layers, make_plan
from launch.calibration.solvers import count_core_seconds
from launch.config.schema import Recipe
from launch.engines.base import read_deepspeed_config
from launch.methods.base import Method
from launch.planning.counting import CountingMode, discard_gradients
from launch.runtime import compat
from launch.runtime.units import GIB
from launch.training.loss import AnswerLoss, in_bf16, label_loss
from launch.training.trainable import as_base, attach_trainable, find_lora_layers

FP32_BYTES = 4
# Share of free memory that is kept back: for fragmentation, the libraries' workspaces, buffers of
# the network, and what the estimate is wrong by (docs/engines-and-memory.md).
RESERVE = 0.1
MOMENTS = "both moments of AdamW, fp32"


@dataclass(frozen=True)
class Stage:
    """One stage's cost."""

    memory: dict[str, int]  # bytes on each rank by what they hold, all at once at the stage's peak
    flops: float  # in the model's dtype, over all ranks

    @property
    def peak(self) -> int:
        """Bytes on each rank at the stage's peak."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Estimate:
    """What a run would take."""

    parameters: int  # of the base
    trainable: int
    calibration: Stage
    initialisation: Stage
    training: Stage
    windows: CalibrationPlan | None  # None: the method needs no calibration
    hidden_states: int  # bytes on the CPU, on each rank, carried from window to window
    sum_flops: float  # fp64, of the calibration's sums, over all ranks
    solve_flops: float  # fp64, of its eigenproblems on GPUs, over all ranks
    solve_core_seconds: float  # of the same on one CPU core
    files: dict[str, int]  # bytes by what they hold

    def get_stages(self) -> dict[str, Stage]:
        """Return the stages by name, in the order in which they run."""
        return {
            "calibration": self.calibration,
            "initialisation": self.initialisation,
            "training": self.training,
        }


@dataclass(frozen=True)
class CalibrationNeeds:
    """What a calibration takes on each rank, whatever its windows are, and how to plan them."""

    held_bytes: int  # of the model, with what its engine gathers
    pass_bytes: int  # at the peak of a forward pass, or a forward and a backward pass
    pass_flops: float  # of one such pass, of one batch
    hidden_states: int  # bytes on the CPU, carried from window to window where there are several
    groups: list[Group]
    # GiB for sums and for solving, None for no limit -> the windows. Raises AstraError if not even
    # one layer fits.
    plan_windows: Callable[[float | None], CalibrationPlan]


@dataclass(frozen=True)
class _Calibration:
    """What a calibration takes; by default none is made."""

    windows: CalibrationPlan | None = None
    pass_bytes: int = 0  # at the peak of a forward pass, or a forward and a backward pass
    hidden_states: int = 0
    flops: float = 0.0
    sum_flops: float = 0.0
    solve_flops: float = 0.0
    solve_core_seconds: float = 0.0


@dataclass(frozen=True)
class _FakeModel:
    """A model without values, with its adapters."""

    base: PreTrainedModel
    model: nn.Module  # the base with its adapters
    linears: Mapping[str, nn.Linear]
    num_parameters: int  # of the base
    num_trained: int
    held: dict[str, int]  # see `_count_held_bytes`


def _make_fake_model(
    config: PretrainedConfig, recipe: Recipe, dtype: torch.dtype, world_size: int
) -> _FakeModel:
    """Make the recipe's model on PyTorch's meta device. Raises AstraError for its targets."""
    method = recipe.adapter.method_record
    base = compat.make_meta_model(config, dtype)
    base.requires_grad_(method.trains_all)
    num_parameters = sum(parameter.numel() for parameter in base.parameters())
    model = attach_trainable(base, recipe.adapter)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return _FakeModel(
        base=base,
        model=model,
        linears=get_base_layers(find_lora_layers(model)),
        num_parameters=num_parameters,
        num_trained=num_trained,
        held=_count_held_bytes(recipe.engine, base, num_trained, world_size, method.trains_all),
    )


def estimate_run(
    config: PretrainedConfig,
    recipe: Recipe,
    *,
    world_size: int,
    dtype: torch.dtype,
    checkpointing: bool,
    steps: int,
    gpu_memory: float | None = None,
) -> Estimate:
    """Estimate what `recipe` takes with a model of `config` on `world_size` ranks.

    Args:
        dtype: of the base.
        checkpointing: whether activations are computed again for the backward pass.
        steps: of the optimiser.
        gpu_memory: GiB of each GPU, from which `calibration.memory_gib: auto` follows.

    Raises:
        AstraError: targets, ranks or calibration.memory_gib do not fit the model.
    """
    if recipe.shard_within == "node":
        raise AstraError("shard_within: the planner computes all alone; set shard_within=all")
    fake = _make_fake_model(config, recipe, dtype, world_size)
    with compat.make_fake_mode():
        # Attention takes a costlier path with meta tensors than with the CPU tensors of this mode.
        compat.replace_tensors(fake.model)
        calibration = _Calibration()
        if recipe.adapter.method_record.is_calibrated:
            needs = _measure_needs(fake, recipe, world_size)
            calibration = _estimate_calibration(fake, needs, recipe, gpu_memory)
        activations, step_flops = _estimate_step(fake.model, recipe, world_size, checkpointing)

    model_bytes = fake.num_parameters * dtype.itemsize
    return Estimate(
        parameters=fake.num_parameters,
        trainable=fake.num_trained,
        calibration=_make_calibration_stage(fake.held, calibration),
        initialisation=_make_initialisation_stage(fake.held, fake.linears, dtype),
        # Activations are at their most when the backward pass begins, with no gathering under way.
        training=Stage(
            _leave_out(fake.held, "prefetched") | {"activations": activations}, steps * step_flops
        ),
        windows=calibration.windows,
        hidden_states=calibration.hidden_states,
        sum_flops=calibration.sum_flops,
        solve_flops=calibration.solve_flops,
        solve_core_seconds=calibration.solve_core_seconds,
        files=_count_file_bytes(recipe, model_bytes, fake.num_trained, fake.linears),
    )


def estimate_calibration_needs(
    config: PretrainedConfig, recipe: Recipe, dtype: torch.dtype, world_size: int
) -> CalibrationNeeds:
    """Estimate what the recipe's calibration takes on each of `world_size` ranks.

    See `estimate_run`. Takes a second for a model of 32 layers.
    """
    fake = _make_fake_model(config, recipe, dtype, world_size)
    with compat.make_fake_mode():
        compat.replace_tensors(fake.model)
        return _measure_needs(fake, recipe, world_size)


def _measure_needs(fake: _FakeModel, recipe: Recipe, world_size: int) -> CalibrationNeeds:
    """Run one batch of the recipe's calibration on fake tensors."""
    settings, length = recipe.calibration, recipe.data.max_length
    statistic = recipe.statistic
    ids = torch.zeros(settings.batch_size, length, dtype=torch.long)
    with as_base(fake.model):
        groups = find_groups(fake.model, fake.linears, {"input_ids": ids}, statistic)

    def plan_windows(memory_gib: float | None) -> CalibrationPlan:
        return make_plan(
            fake.base,
            fake.linears,
            groups,
            tokens=length * settings.batch_size,
            num_parts=1 + settings.split_half,
            memory=None if memory_gib is None else memory_gib * GIB,
            decomposition=recipe.adapter.method_record.decomposition,
        )

    peak, flops, hidden_states = 0, 0.0, 0
    if statistic == "gradient":
        peak, flops = _run_gradients(fake.model, fake.linears, ids, plan_windows(None))
    elif statistic != "weight":
        peak, flops = _run_forward(fake.model, ids)
        num_batches = math.ceil(settings.samples / (settings.batch_size * world_size))  # of a rank
        hidden_size = fake.base.config.get_text_config().hidden_size
        num_tokens = num_batches * settings.batch_size * length
        hidden_states = num_tokens * hidden_size * fake.base.dtype.itemsize
    return CalibrationNeeds(
        held_bytes=sum(_leave_out(fake.held, "gradients and optimiser").values()),
        pass_bytes=peak,
        pass_flops=flops,
        hidden_states=hidden_states,
        groups=groups,
        plan_windows=plan_windows,
    )


def _estimate_calibration(
    fake: _FakeModel, needs: CalibrationNeeds, recipe: Recipe, gpu_memory: float | None
) -> _Calibration:
    """Plan the windows of the recipe's calibration, and count its operations."""
    settings, statistic = recipe.calibration, recipe.statistic
    plan = _plan_windows(needs, settings.memory_gib, gpu_memory)
    num_passes = len(plan.windows) if statistic == "gradient" else 1
    num_samples = 0 if statistic == "weight" else settings.samples
    num_tokens = num_samples * recipe.data.max_length
    lora_ranks = dict.fromkeys(fake.linears, recipe.adapter.rank)
    decomposition = recipe.adapter.method_record.decomposition
    return _Calibration(
        windows=plan,
        pass_bytes=needs.pass_bytes,
        hidden_states=needs.hidden_states if plan.layers is not None else 0,
        flops=num_passes * needs.pass_flops / settings.batch_size * num_samples,
        sum_flops=num_tokens * sum(count_sum_flops(group, fake.linears) for group in needs.groups),
        solve_flops=sum(
            count_solve_flops(group, fake.linears, lora_ranks, decomposition, "cuda")
            for group in needs.groups
        ),
        solve_core_seconds=count_core_seconds(
            needs.groups, fake.linears, lora_ranks, decomposition
        ),
    )


def _plan_windows(
    needs: CalibrationNeeds, memory_gib: float | str | None, gpu_memory: float | None
) -> CalibrationPlan:
    """Plan the windows within calibration.memory_gib.

    With `auto` that follows from the GPUs' memory; windows are then at least one layer, whether it
    fits or not, and without the GPUs' memory there is one window.
    """
    if memory_gib != "auto":
        return needs.plan_windows(memory_gib)
    if gpu_memory is None:
        return needs.plan_windows(None)
    left = (1 - RESERVE) * gpu_memory * GIB - needs.held_bytes - needs.pass_bytes
    try:
        return needs.plan_windows(max(0.0, left) / GIB)
    except AstraError:
        return needs.plan_windows(None)  # the verdict is that it does not fit


def _run_forward(model: nn.Module, ids: Tensor) -> tuple[int, int]:
    """Run a forward pass of the base. Returns bytes at the peak, and floating-point operations."""
    with CountingMode() as counted, as_base(model), torch.no_grad():
        run_forward(model.eval(), {"input_ids": ids})
    return counted.peak, counted.flops


def _run_gradients(
    model: nn.Module, linears: Mapping[str, nn.Linear], ids: Tensor, plan: CalibrationPlan
) -> tuple[int, int]:
    """Run the forward and backward passes that gradients are calibrated with.

    Returns:
        Bytes at the peak beside the statistics, and floating-point operations.
    """
    window = plan.windows[0]
    with CountingMode() as counted, as_base(model):
        batch = {"input_ids": ids, "labels": ids}
        sum_gradients(model.eval(), linears, [batch], window, label_loss)
    # The statistics are counted as a part of the plan. Adding to them in place counts no product.
    return counted.peak - window.statistics_bytes, counted.flops


def _estimate_step(
    model: nn.Module, recipe: Recipe, world_size: int, checkpointing: bool
) -> tuple[int, float]:
    """Run one micro batch forwards and backwards on fake tensors.

    Returns:
        Bytes of activations at the peak, and floating-point operations of a whole step.
    """
    settings = recipe.train
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    micro_batch = min(settings.micro_batch, math.ceil(settings.global_batch / world_size))
    ids = torch.zeros(micro_batch, recipe.data.max_length, dtype=torch.long)
    discard_gradients(model)  # they are counted as held, and sharded
    every_token = torch.arange(ids.numel() - 1)  # as if all were part of an answer
    with CountingMode() as counted, in_bf16(model):
        AnswerLoss(model.train())(ids, every_token, ids.flatten()[1:]).backward()
    return counted.peak, counted.flops / micro_batch * settings.global_batch


def _make_calibration_stage(held: dict[str, int], calibration: _Calibration) -> Stage:
    """Return the calibration's memory and arithmetic. Nothing is being trained yet."""
    statistics = working = 0
    plan = calibration.windows
    if plan is not None:
        statistics = max(window.statistics_bytes for window in plan.windows)
        working = max(calibration.pass_bytes, plan.working_bytes)
    memory = _leave_out(held, "gradients and optimiser")
    memory |= {"statistics": statistics, "forward pass or solving": working}
    return Stage(memory, calibration.flops)


def _make_initialisation_stage(
    held: dict[str, int], linears: Mapping[str, nn.Linear], dtype: torch.dtype
) -> Stage:
    """Return the memory in which A0, B0 and W_res are written, one module after the other."""
    sizes = [linear.in_features * linear.out_features for linear in linears.values()]
    # W in its own dtype, gathered and copied; W, B0 A0, W_res and what is between them in fp64.
    one_weight = max(sizes, default=0) * (3 * dtype.itemsize + 6 * FP64_BYTES)
    memory = {"base": held["base"], "adapters": held["adapters"], "one weight": one_weight}
    return Stage(memory, 0.0)


def _count_file_bytes(
    recipe: Recipe, model_bytes: int, num_trained: int, linears: Mapping[str, nn.Linear]
) -> dict[str, int]:
    """Return the bytes of a checkpoint, of what is exported and of the calibration, by contents."""
    method, trained_bytes = recipe.adapter.method_record, FP32_BYTES * num_trained
    if method.trains_all:
        checkpoint, num_copies = f"a checkpoint (all parameters and {MOMENTS})", 3
        exported, export_bytes = "export: model", model_bytes
    else:
        checkpoint, num_copies = f"a checkpoint (A0, B0, what is trained and {MOMENTS})", 4
        exported, num_exported = _describe_export(method)
        export_bytes = num_exported * trained_bytes
    calibration_bytes = 0
    if method.is_calibrated:
        for linear in linears.values():
            # Eigenvectors are of the outputs. Factors are A0 of the inputs and B0 of the outputs.
            size = linear.out_features
            if method.solution == "factors":
                size += linear.in_features
            calibration_bytes += FP64_BYTES * recipe.adapter.rank * size
    files = {
        checkpoint: num_copies * trained_bytes,
        exported: export_bytes,
        "calibration: eigenvectors, or factors, fp64": calibration_bytes,
    }
    if recipe.export.rank:
        sides = sum(linear.in_features + linear.out_features for linear in linears.values())
        files["export: lora_small"] = FP32_BYTES * recipe.export.rank * sides
    if recipe.export.merged:
        files["export: merged"] = model_bytes
    return files


def _describe_export(method: Method) -> tuple[str, int]:
    """Return what a method with adapters exports, and how many times the trained values that is."""
    if method.use_dora:
        return "export: adapter", 1
    if method.starts_on_residual:
        return "export: adapter, astra_init and lora of twice the rank", 4
    return "export: adapter and lora", 2


def _count_held_bytes(
    engine: str, base: nn.Module, num_trained: int, world_size: int, trains_all: bool
) -> dict[str, int]:
    """Return the bytes on each rank's device of the model and its optimiser, by what they hold.

    `gathered` are whole weights in use where ranks hold shards, `prefetched` those that come next.
    """
    zero = {}
    if engine not in ("single", "fsdp"):
        zero = read_deepspeed_config(engine)["zero_optimization"]
    is_sharded = engine == "fsdp" or zero.get("stage") == 3
    is_offloaded = "offload_param" in zero
    num_shards = world_size if is_sharded else 1
    weights = _count_weight_bytes(base, trains_all)
    stepped = FP32_BYTES * num_trained  # what AdamW steps
    # In full fine-tuning FSDP2 and plain PyTorch hold what AdamW steps. DeepSpeed holds a copy in
    # the model's dtype beside it.
    held_weights = stepped if trains_all and not zero else weights
    held = {
        "base": held_weights // num_shards,
        "adapters": 0 if trains_all else stepped // num_shards,
        "gradients and optimiser": 3 * stepped // world_size,  # AdamW has two moments
        "gathered": 0,
        "prefetched": 0,
    }
    if zero:  # DeepSpeed's own copy of what it steps, and its buffer of gradients to be reduced
        buffer = FP32_BYTES * min(num_trained, zero["reduce_bucket_size"])
        stepped_shard = 0 if is_offloaded else 4 * stepped // world_size
        held["gradients and optimiser"] = buffer + stepped_shard
    if is_offloaded:
        held |= {"base": 0, "adapters": 0}
    if engine == "fsdp":
        held["gathered"] = _count_fsdp_gathered(base, weights, trains_all)
    elif engine == "single" and trains_all and weights < stepped:
        held["gathered"] = weights  # autocast's copies
    elif is_sharded and (world_size > 1 or is_offloaded):
        itemsize = next(base.parameters()).element_size()
        held["gathered"] = min(weights, zero["stage3_max_live_parameters"] * itemsize)
        prefetched = min(weights, zero["stage3_prefetch_bucket_size"] * itemsize)
        held["prefetched"] = 2 * prefetched  # and its copy
    return held


def _count_fsdp_gathered(base: nn.Module, weights: int, trains_all: bool) -> int:
    """Return the bytes that FSDP2 gathers at its peak, of a base with `weights` bytes.

    Those are one layer and the parameters outside of layers, or one layer while the next comes.
    """
    layers = sorted(_count_weight_bytes(layer, trains_all) for layer in find_layers(base, {}))
    gathered = max(weights - sum(layers) + layers[-1], sum(layers[-2:]))
    return 2 * gathered if trains_all else gathered  # with their gradients


def _count_weight_bytes(module: nn.Module, trains_all: bool) -> int:
    """Return the bytes of the base's weights in `module`, without the adapters'."""
    total = 0
    for parameter in module.parameters():
        if trains_all or not parameter.requires_grad:
            total += parameter.numel() * parameter.element_size()
    return total


def _leave_out(parts: dict[str, int], name: str) -> dict[str, int]:
    """Return a copy of `parts` without the part called `name`."""
    return {key: size for key, size in parts.items() if key != name}
