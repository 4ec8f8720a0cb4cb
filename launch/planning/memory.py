"""The memory of each GPU, stage by stage, and the files of a run, from the shapes of its model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from astra.windows import FP64_BYTES, CalibrationPlan
from launch.config.schema import Recipe
from launch.engines.base import read_deepspeed_config
from launch.methods.base import Method
from launch.planning.model import FakeModel

FP32_BYTES = 4
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


def make_calibration_stage(
    held: dict[str, int], plan: CalibrationPlan | None, pass_bytes: int, flops: float
) -> Stage:
    """Return the calibration's memory and arithmetic. Nothing is being trained yet.

    The sums of the largest window, and the larger one of a pass and of what solving works in.

    Args:
        held: see `count_held_bytes`.
        plan: None where nothing is calibrated.
        pass_bytes: at the peak of a pass.
    """
    statistics = working = 0
    if plan is not None:
        statistics = max(window.sums_bytes for window in plan.windows)
        working = max(pass_bytes, plan.working_bytes)
    memory = leave_out(held, "gradients and optimiser")
    memory |= {"statistics": statistics, "forward pass or solving": working}
    return Stage(memory, flops)


def make_initialisation_stage(
    held: dict[str, int], linears: Mapping[str, nn.Linear], dtype: torch.dtype
) -> Stage:
    """Return the memory in which A0, B0 and W_res are written, one module after the other.

    Of the largest weight three copies in its dtype (W, gathered and copied) and six in fp64 (W,
    B0 A0, W_res and what is between them).
    """
    sizes = [linear.in_features * linear.out_features for linear in linears.values()]
    one_weight = max(sizes, default=0) * (3 * dtype.itemsize + 6 * FP64_BYTES)
    memory = {"base": held["base"], "adapters": held["adapters"], "one weight": one_weight}
    return Stage(memory, 0.0)


def make_training_stage(held: dict[str, int], activations: int, flops: float) -> Stage:
    """Return the training's memory and arithmetic.

    Activations are at their most when the backward pass begins, with no gathering under way.
    """
    return Stage(leave_out(held, "prefetched") | {"activations": activations}, flops)


def count_file_bytes(recipe: Recipe, fake: FakeModel) -> dict[str, int]:
    """Return the bytes of a checkpoint, of what is exported and of the calibration, by contents."""
    method, trained_bytes = recipe.adapter.method_record, FP32_BYTES * fake.num_trained
    model_bytes = fake.num_parameters * fake.dtype.itemsize
    if method.trains_all:
        checkpoint = f"a checkpoint (all parameters and {MOMENTS})"
        checkpoint_bytes = 3 * trained_bytes
        exported, export_bytes = "export: model", model_bytes
    else:
        # Of a new head there is no initial value in a checkpoint, nor in astra_init.
        checkpoint = f"a checkpoint (A0, B0, what is trained and {MOMENTS})"
        exported, num_exported = _describe_export(method)
        head_bytes = FP32_BYTES * fake.num_head
        export_bytes = num_exported * (trained_bytes - head_bytes)
        export_bytes += min(2, num_exported) * head_bytes
        checkpoint_bytes = 4 * trained_bytes - head_bytes
    calibration_bytes = 0
    if method.is_calibrated:
        for linear in fake.linears.values():
            # Eigenvectors are of the outputs. Factors are A0 of the inputs and B0 of the outputs.
            size = linear.out_features
            if method.solution == "factors":
                size += linear.in_features
            calibration_bytes += FP64_BYTES * recipe.adapter.rank * size
    files = {
        checkpoint: checkpoint_bytes,
        exported: export_bytes,
        "calibration: eigenvectors, or factors, fp64": calibration_bytes,
    }
    if recipe.export.rank:
        sides = sum(linear.in_features + linear.out_features for linear in fake.linears.values())
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


def count_held_bytes(
    engine: str, fake: FakeModel, world_size: int, node_size: int | None = None
) -> dict[str, int]:
    """Return the bytes on each rank's device of the model and its optimiser, by what they hold.

    A sharded engine holds 1 / world_size of the base and of what is trained. AdamW has a gradient
    and two moments of what it steps, in fp32; DeepSpeed also a copy and a buffer of gradients.
    `gathered` are whole weights in use where ranks hold shards, `prefetched` those that come next.

    Where each node holds the base, FSDP2 holds 1 / node_size of it and of what is trained. ZeRO-3
    holds 1 / node_size of all weights beside its 1 / world_size (ZeRO++'s hpZ,
    partition_parameters.py, _partition_param_sec).

    Args:
        node_size: ranks of each of several nodes, if each node holds the base; None: all hold one.
    """
    zero, offloaded = _read_zero_settings(engine), is_offloaded(engine)
    is_sharded = engine == "fsdp" or zero.get("stage") == 3
    num_shards = 1
    if is_sharded:
        num_shards = node_size if node_size and engine == "fsdp" else world_size
    weights, trains_all = fake.weight_bytes, fake.trains_all
    stepped = FP32_BYTES * fake.num_trained  # what AdamW steps
    # In full fine-tuning FSDP2 and plain PyTorch hold what AdamW steps. DeepSpeed holds a copy in
    # the model's dtype beside it.
    held_weights = stepped if trains_all and not zero else weights
    held = {
        "base": held_weights // num_shards,
        "adapters": 0 if trains_all else stepped // num_shards,
        "gradients and optimiser": 3 * stepped // num_shards,  # AdamW has two moments
        "gathered": 0,
        "prefetched": 0,
    }
    if zero:  # DeepSpeed's own copy of what it steps, and its buffer of gradients to be reduced
        # On GPUs it takes whole buckets, however little is trained, and stage 2 takes two: at most
        # 0.4 GiB, which the reserve holds. On CPUs pages of a buffer that is not filled take nothing.
        buffer = FP32_BYTES * min(fake.num_trained, zero["reduce_bucket_size"])
        stepped_shard = 0 if offloaded else 4 * stepped // world_size
        held["gradients and optimiser"] = buffer + stepped_shard
    if offloaded:
        held |= {"base": 0, "adapters": 0}
    elif node_size and zero:
        held["base"] += weights // node_size
        held["adapters"] += 0 if trains_all else stepped // node_size
    if engine == "fsdp":
        held["gathered"] = _count_fsdp_gathered(fake)
    elif engine == "single" and trains_all and weights < stepped:
        held["gathered"] = weights  # autocast's copies
    elif is_sharded and (world_size > 1 or offloaded):
        itemsize = fake.dtype.itemsize
        held["gathered"] = min(weights, zero["stage3_max_live_parameters"] * itemsize)
        prefetched = min(weights, zero["stage3_prefetch_bucket_size"] * itemsize)
        held["prefetched"] = 2 * prefetched  # and its copy
    return held


def is_offloaded(engine: str) -> bool:
    """Return whether an engine keeps weights in main memory."""
    return "offload_param" in _read_zero_settings(engine)


def _read_zero_settings(engine: str) -> dict[str, Any]:
    """Return DeepSpeed's settings of ZeRO; empty for the engines without it."""
    if not engine.startswith("zero"):
        return {}
    return read_deepspeed_config(engine)["zero_optimization"]


def _count_fsdp_gathered(fake: FakeModel) -> int:
    """Return the bytes that FSDP2 gathers at its peak.

    Those are one layer and the parameters outside of layers, or one layer while the next comes.
    """
    layers = sorted(fake.layer_bytes)
    gathered = max(fake.weight_bytes - sum(layers[:-1]), sum(layers[-2:]))
    return 2 * gathered if fake.trains_all else gathered  # with their gradients


def leave_out(parts: dict[str, int], name: str) -> dict[str, int]:
    """Return a copy of `parts` without the part called `name`."""
    return {key: size for key, size in parts.items() if key != name}
