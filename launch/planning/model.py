"""Run a recipe's model without numbers: a calibration batch, and a micro batch of its training.

They really run, on PyTorch's fake tensors, which have shapes and no memory. The bytes alive at the
peak, the matrix products and the traffic of memory are counted while the run's own code makes them.
Every example is taken to be data.max_length tokens long. Nothing here depends on the engine.
"""

import copy
import functools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from astra.adapter import get_base_layers
from astra.errors import AstraError
from astra.gradients import Loss, sum_gradients
from astra.moments import Batch, Group, find_groups, run_forward
from astra.windows import CANNOT_SPLIT, CalibrationPlan, find_layers, make_plan
from launch.config.schema import Recipe
from launch.data.batches import RowBatch
from launch.planning.counting import CountingMode, Operation, discard_gradients
from launch.runtime.compat.torch_parts import find_tensors, make_fake_mode, replace_tensors
from launch.runtime.compat.transformers_parts import make_meta_model
from launch.runtime.units import GIB
from launch.training.loss import CHUNK_GPU, AnswerLoss, in_bf16, sum_label_loss
from launch.training.row_loss import RowLoss, sum_row_label_loss
from launch.training.trainable import as_base, attach_trainable, find_lora_layers

EstimateT = TypeVar("EstimateT")
# Names of the probability in configs of transformers.
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")


@dataclass(frozen=True)
class FakeModel:
    """A model without values, with its adapters."""

    base: PreTrainedModel
    model: nn.Module  # the base with its adapters
    linears: Mapping[str, nn.Linear]
    dtype: torch.dtype  # of the base
    num_parameters: int  # of the base, with a new head
    num_trained: int
    num_head: int  # of the parameters that are trained, those of a new head
    trains_all: bool

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the base's weights, without the adapters'."""
        return count_weight_bytes(self.base, self.trains_all)

    @cached_property
    def layer_bytes(self) -> list[int]:
        """Bytes of each layer's weights, without the adapters'."""
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
    can_split: bool  # whether it can run in windows of layers
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


def make_fake_model(
    config: PretrainedConfig, recipe: Recipe, dtype: torch.dtype, head: Sequence[str] = ()
) -> FakeModel:
    """Make the recipe's model on PyTorch's meta device. Raises AstraError for its targets.

    Args:
        config: for a causal language model or, filled in by a `Head`, for one with a new head.
        head: parameters of the new head, of `CheckedModel.head_parameters`.
    """
    method = recipe.adapter.method_record
    base = make_meta_model(_without_attention_dropout(config), dtype)
    base.requires_grad_(method.trains_all)
    num_parameters = sum(parameter.numel() for parameter in base.parameters())
    num_head = sum(base.get_parameter(name).numel() for name in head)
    model = attach_trainable(base, recipe.adapter, head=head)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return FakeModel(
        base=base,
        model=model,
        linears=get_base_layers(find_lora_layers(model)),
        dtype=dtype,
        num_parameters=num_parameters,
        num_trained=num_trained,
        num_head=num_head,
        trains_all=method.trains_all,
    )


def _without_attention_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config with attention as GPUs run it, which keep no scores with dropout either.

    On the CPU, for which fake tensors are, dropout keeps PyTorch from its fused attention.
    """
    config = copy.deepcopy(config)
    for name in ATTENTION_DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


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
    head: Sequence[str] = (),
) -> ModelRun:
    """Run the recipe's calibration and training on fake tensors. Seconds for 32 layers.

    Args:
        dtype: of the base.
        checkpointing: whether activations are computed again for the backward pass; every value
            is tried.
        config, head: see `make_fake_model`.

    Raises:
        AstraError: targets or ranks do not fit the model.
    """
    settings = recipe.train
    num_examples = math.ceil(settings.global_batch / world_size)
    micro_batch = min(settings.micro_batch, num_examples)
    fake = make_fake_model(config, recipe, dtype, head)
    with make_fake_mode():
        # Attention takes a costlier path with meta tensors than with the CPU tensors of this mode.
        replace_tensors(fake.model)
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
    batch = _make_calibration_batch(recipe)
    with as_base(fake.model):
        groups = find_groups(fake.model, fake.linears, batch, statistic)
    has_forward = statistic not in ("gradient", "weight")
    layers = find_layers(fake.base, fake.linears)
    pass_on_one = layers is None or not has_forward or _check_layers(fake, layers, batch)
    make = functools.partial(
        make_plan,
        fake.base,
        fake.linears,
        groups,
        tokens=length * settings.batch_size,
        num_parts=1 + settings.split_half,
        decomposition=recipe.adapter.method_record.decomposition,
    )

    def plan_windows(memory_gib: float | None) -> CalibrationPlan:
        plan = make()
        if memory_gib is None or plan.peak_bytes <= memory_gib * GIB:
            return plan
        if not pass_on_one:
            raise AstraError(CANNOT_SPLIT, "memory")
        return make(memory=memory_gib * GIB)

    once, hidden_states = Pass(), 0
    has_backward = statistic == "gradient"
    if has_backward:
        loss = sum_row_label_loss if recipe.task.has_head else sum_label_loss
        once = _run_gradients(fake.model, fake.linears, batch, plan_windows(None), loss)
    elif has_forward:
        once = _run_forward(fake, batch)
        num_batches = math.ceil(settings.samples / (settings.batch_size * world_size))  # of a rank
        hidden_size = fake.base.config.get_text_config().hidden_size
        num_tokens = num_batches * settings.batch_size * length
        hidden_states = num_tokens * hidden_size * fake.base.dtype.itemsize
    can_split = layers is not None and pass_on_one
    return CalibrationBatch(once, has_backward, groups, hidden_states, can_split, plan_windows)


def _make_calibration_batch(recipe: Recipe) -> Batch:
    """Make a batch of the recipe's calibration, without values."""
    size, length = recipe.calibration.batch_size, recipe.data.max_length
    if recipe.task.has_head:
        rows = _make_row_batch(recipe, size)
        is_real = torch.ones(size, length, dtype=torch.bool)
        return Batch(**rows.inputs(), token_mask=is_real, row_labels=rows.labels)
    ids = torch.zeros(size, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


def _make_row_batch(recipe: Recipe, size: int) -> RowBatch:
    """Make a batch of `size` rows with labels, without values.

    It has no token types: models that need them make them by themselves.
    """
    shape = (size, recipe.data.max_length)
    is_classes = recipe.task.kind == "classification"
    return RowBatch(
        input_ids=torch.zeros(shape, dtype=torch.long),
        attention_mask=torch.ones(shape, dtype=torch.long),
        token_type_ids=None,
        labels=torch.zeros(size, dtype=torch.long if is_classes else torch.float32),
        weights=torch.ones(size, dtype=torch.float64),
    )


def _run_forward(fake: FakeModel, batch: Batch) -> Pass:
    """Run a forward pass of the base."""
    with CountingMode() as counted, as_base(fake.model), torch.no_grad():
        run_forward(fake.model.eval(), batch, fake.linears)
    return Pass(counted.peak, counted.operations)


def _check_layers(fake: FakeModel, layers: nn.ModuleList, batch: Batch) -> bool:
    """Return whether each of `layers` passes on one tensor, and nothing else, to later layers.

    Layers that share keys and values do not (Gemma 3n), nor those whose hidden states the model
    collects for later ones (Inkling 2).
    """
    frozen = [parameter for parameter in layers.parameters() if not parameter.requires_grad]
    # What a layer makes then requires a gradient, and nothing that was there before the layers does.
    for parameter in frozen:
        parameter.requires_grad_(True)
    with _watch_layers(layers) as passes_one, as_base(fake.model), torch.enable_grad():
        run_forward(fake.model.eval(), batch, fake.linears)
    for parameter in frozen:
        parameter.requires_grad_(False)
    return all(passes_one)


@contextmanager
def _watch_layers(layers: nn.ModuleList) -> Iterator[list[bool]]:
    """Within the context, note whether layers take and return hidden states alone of other layers.

    Yields:
        A list with an item for what each layer takes and for what it returns.
    """
    passes_one: list[bool] = []

    def check_inputs(_layer: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        others = [*args[1:], *(kwargs[name] for name in kwargs if name != "hidden_states")]
        # transformers shares keys and values in a mapping that PyTorch does not look into.
        values = [dict(value) if isinstance(value, Mapping) else value for value in others]
        passes_one.append(not any(one.requires_grad for one in find_tensors(values)))

    def check_output(_layer: nn.Module, _args: tuple, output: object) -> None:
        passes_one.append(isinstance(output, Tensor))

    handles = []
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(check_inputs, with_kwargs=True))
        handles.append(layer.register_forward_hook(check_output))
    try:
        yield passes_one
    finally:
        for handle in handles:
            handle.remove()


def _run_gradients(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batch: Batch,
    plan: CalibrationPlan,
    loss: Loss,
) -> Pass:
    """Run the forward and backward passes that gradients are calibrated with."""
    window = plan.windows[0]
    with CountingMode() as counted, as_base(model):
        sum_gradients(model.eval(), linears, [batch], window, loss)
    # The statistics are counted as a part of the plan. Adding to them in place counts no product.
    return Pass(counted.peak - window.sums_bytes, counted.operations)


def _run_micro_batch(model: nn.Module, recipe: Recipe, size: int, checkpointing: bool) -> Pass:
    """Run a micro batch of `size` examples forwards and backwards, as in training on a GPU."""
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    if recipe.task.has_head:
        loss, arguments = RowLoss(model), _make_row_batch(recipe, size).arguments()
    else:
        ids = torch.zeros(size, recipe.data.max_length, dtype=torch.long)
        every_token = torch.arange(ids.numel() - 1)  # as if all were part of an answer
        loss, arguments = AnswerLoss(model, CHUNK_GPU), (ids, every_token, ids.flatten()[1:])
    with CountingMode() as counted, in_bf16(model):
        loss(*arguments).backward()
    return Pass(counted.peak, counted.operations)
