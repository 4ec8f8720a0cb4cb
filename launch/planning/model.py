"""Run a recipe's model without numbers: a calibration batch, and a micro batch of its training.

They really run, on PyTorch's fake tensors, which have shapes and no memory. The bytes alive at the
peak, the matrix products and the traffic of memory are counted while the run's own code makes them.
Every example is taken to be data.max_length tokens long. Nothing here depends on the engine.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from astra.adapter import get_base_layers
from astra.errors import AstraError
from astra.gradients import sum_gradients
from astra.moments import Group, find_groups, run_forward
from astra.windows import CalibrationPlan, find_layers, make_plan
from launch.config.schema import Recipe
from launch.planning.counting import CountingMode, Operation, discard_gradients
from launch.runtime import compat
from launch.runtime.units import GIB
from launch.training.loss import CHUNK_GPU, AnswerLoss, in_bf16, label_loss
from launch.training.trainable import as_base, attach_trainable, find_lora_layers

EstimateT = TypeVar("EstimateT")
CAUSAL_ONLY = "the planner knows causal tasks alone"  # why there is no estimate for other tasks


@dataclass(frozen=True)
class FakeModel:
    """A model without values, with its adapters."""

    base: PreTrainedModel
    model: nn.Module  # the base with its adapters
    linears: Mapping[str, nn.Linear]
    dtype: torch.dtype  # of the base
    num_parameters: int  # of the base
    num_trained: int
    trains_all: bool

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the base's weights, without the adapters'."""
        return count_weight_bytes(self.base, self.trains_all)

    @cached_property
    def layer_bytes(self) -> list[int]:
        """Bytes of each decoder layer's weights, without the adapters'."""
        layers = find_layers(self.base, {}) or []
        return [count_weight_bytes(layer, self.trains_all) for layer in layers]


@dataclass(frozen=True)
class Pass:
    """A forward pass, or a forward and a backward pass, of one batch."""

    peak: int = 0  # bytes alive at the peak, without weights and what is summed
    operations: Counter[Operation] | None = None  # -> how many of them run

    @property
    def flops(self) -> int:
        """Floating-point operations of matrix products and attention."""
        operations = self.operations or {}
        return sum(one.flops * count for one, count in operations.items())


@dataclass(frozen=True)
class CalibrationBatch:
    """A batch of the recipe's calibration."""

    once: Pass
    has_backward: bool
    groups: list[Group]
    hidden_states: int  # bytes on the CPU, carried from window to window where there are several
    # GiB for sums and for solving, None for no limit -> the windows. Raises AstraError if not even
    # one layer fits.
    plan_windows: Callable[[float | None], CalibrationPlan]


@dataclass(frozen=True)
class ModelRun:
    """What a recipe's model does on each rank, whatever its engine."""

    fake: FakeModel
    calibration: CalibrationBatch | None  # None: the method needs none
    micro_batch: int  # examples
    num_micro_batches: int  # of a step, on each rank
    training: dict[bool, Pass]  # with gradient checkpointing or without -> a micro batch


def make_fake_model(config: PretrainedConfig, recipe: Recipe, dtype: torch.dtype) -> FakeModel:
    """Make the recipe's model on PyTorch's meta device. Raises AstraError for its targets."""
    method = recipe.adapter.method_record
    base = compat.make_meta_model(config, dtype)
    base.requires_grad_(method.trains_all)
    num_parameters = sum(parameter.numel() for parameter in base.parameters())
    model = attach_trainable(base, recipe.adapter)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return FakeModel(
        base=base,
        model=model,
        linears=get_base_layers(find_lora_layers(model)),
        dtype=dtype,
        num_parameters=num_parameters,
        num_trained=num_trained,
        trains_all=method.trains_all,
    )


def count_weight_bytes(module: nn.Module, trains_all: bool) -> int:
    """Return the bytes of the base's weights in `module`, without the adapters'."""
    total = 0
    for parameter in module.parameters():
        if trains_all or not parameter.requires_grad:
            total += parameter.numel() * parameter.element_size()
    return total


def try_estimate(
    estimate: Callable[[], EstimateT],
) -> tuple[EstimateT, None] | tuple[None, str]:
    """Return what `estimate` returns, and None; or None, and why a model does not run without numbers.

    Any model may fail on fake tensors, and no run needs an estimate.

    Raises:
        AstraError: targets or ranks do not fit the model.
    """
    try:
        return estimate(), None
    except AstraError:
        raise
    except Exception as error:  # noqa: BLE001
        return None, " ".join(f"{type(error).__name__}: {error}".split())[:200]


def run_without_numbers(
    config: PretrainedConfig,
    recipe: Recipe,
    dtype: torch.dtype,
    world_size: int,
    checkpointing: Collection[bool],
) -> ModelRun:
    """Run the recipe's calibration and training on fake tensors. Seconds for 32 layers.

    Args:
        dtype: of the base.
        checkpointing: whether activations are computed again for the backward pass; every value
            is tried.

    Raises:
        AstraError: targets or ranks do not fit the model.
    """
    settings = recipe.train
    num_examples = math.ceil(settings.global_batch / world_size)
    micro_batch = min(settings.micro_batch, num_examples)
    fake = make_fake_model(config, recipe, dtype)
    with compat.make_fake_mode():
        # Attention takes a costlier path with meta tensors than with the CPU tensors of this mode.
        compat.replace_tensors(fake.model)
        calibration = None
        if recipe.adapter.method_record.is_calibrated:
            calibration = run_calibration_batch(fake, recipe, world_size)
        discard_gradients(fake.model)  # they are counted as held, and sharded
        training = {}
        for enabled in sorted(set(checkpointing)):  # without it first: it cannot be undone entirely
            training[enabled] = _run_micro_batch(fake.model, recipe, micro_batch, enabled)
    return ModelRun(
        fake=fake,
        calibration=calibration,
        micro_batch=micro_batch,
        num_micro_batches=math.ceil(num_examples / micro_batch),
        training=training,
    )


def run_calibration_batch(fake: FakeModel, recipe: Recipe, world_size: int) -> CalibrationBatch:
    """Run one batch of the recipe's calibration. To be called in a fake mode."""
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

    once, hidden_states = Pass(), 0
    if statistic == "gradient":
        once = _run_gradients(fake.model, fake.linears, ids, plan_windows(None))
    elif statistic != "weight":
        once = _run_forward(fake.model, ids)
        num_batches = math.ceil(settings.samples / (settings.batch_size * world_size))  # of a rank
        hidden_size = fake.base.config.get_text_config().hidden_size
        num_tokens = num_batches * settings.batch_size * length
        hidden_states = num_tokens * hidden_size * fake.base.dtype.itemsize
    return CalibrationBatch(once, statistic == "gradient", groups, hidden_states, plan_windows)


def _run_forward(model: nn.Module, ids: Tensor) -> Pass:
    """Run a forward pass of the base."""
    with CountingMode() as counted, as_base(model), torch.no_grad():
        run_forward(model.eval(), {"input_ids": ids})
    return Pass(counted.peak, counted.operations)


def _run_gradients(
    model: nn.Module, linears: Mapping[str, nn.Linear], ids: Tensor, plan: CalibrationPlan
) -> Pass:
    """Run the forward and backward passes that gradients are calibrated with."""
    window = plan.windows[0]
    with CountingMode() as counted, as_base(model):
        batch = {"input_ids": ids, "labels": ids}
        sum_gradients(model.eval(), linears, [batch], window, label_loss)
    # The statistics are counted as a part of the plan. Adding to them in place counts no product.
    return Pass(counted.peak - window.statistics_bytes, counted.operations)


def _run_micro_batch(model: nn.Module, recipe: Recipe, size: int, checkpointing: bool) -> Pass:
    """Run a micro batch of `size` examples forwards and backwards, as in training on a GPU."""
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros(size, recipe.data.max_length, dtype=torch.long)
    every_token = torch.arange(ids.numel() - 1)  # as if all were part of an answer
    with CountingMode() as counted, in_bf16(model):
        AnswerLoss(model.train(), CHUNK_GPU)(ids, every_token, ids.flatten()[1:]).backward()
    return Pass(counted.peak, counted.operations)
