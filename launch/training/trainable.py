"""What is trained: adapters in the base, or all of its parameters. All that differs is here."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from astra.adapter import (
    ADAPTER,
    Factors,
    attach_adapters,
    get_head_parameters,
    get_lora_layers,
    get_trained_parameters,
    read_factors,
    read_head,
    read_magnitudes,
)
from astra.targets import abbreviate_name, is_of_pooler, match_targets
from launch.config.schema import Adapter, Train
from launch.data.inputs import Inputs
from launch.engines import Engine
from launch.models.check import CheckedModel, draw_weight, make_meta_model, read_config
from launch.runtime.compat.deepspeed_parts import count_elements, get_full_shape
from launch.runtime.distributed import run_on_rank0
from launch.training.export import save_adapters
from launch.training.model_export import save_model

NUM_SKIPPED = 8  # kinds of modules without an adapter that a run names


def attach_trainable(
    base: PreTrainedModel,
    settings: Adapter,
    lora_ranks: dict[str, int] | None = None,
    head: Sequence[str] = (),
) -> nn.Module:
    """Return the model that is trained: `base` with PEFT's layers at the targets, or itself.

    Args:
        lora_ranks: of every module, where they are not all alike.
        head: parameters of a new head, of `CheckedModel.head_parameters`.
    """
    method = settings.method_record
    if method.trains_all:
        return base
    keep_head_in_fp32(base, head)
    return attach_adapters(
        base,
        settings.targets,
        settings.rank,
        settings.alpha,
        settings.dropout,
        lora_ranks,
        rslora=method.use_rslora,
        dora=method.use_dora,
        exclude=settings.exclude,
        head=head,
    )


def keep_head_in_fp32(base: PreTrainedModel, head: Sequence[str]) -> None:
    """Give a new head's parameters fp32 on a base in bf16, and have its modules compute in fp32.

    Each is replaced by an empty fp32 parameter. ZeRO-3 shards the head together with the adapters,
    so both need the same dtype.
    """
    if base.dtype == torch.float32:
        return
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in head):
        module = base.get_submodule(owner)
        for name, old in list(module.named_parameters(recurse=False)):
            empty = torch.empty(get_full_shape(old), dtype=torch.float32, device=old.device)
            setattr(module, name, nn.Parameter(empty))
        module.forward = _compute_in_fp32(module.forward)


def _compute_in_fp32(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a module's `forward` on hidden states in fp32, also where RowLoss autocasts to bf16.

    An output in bf16 has 8 significant bits: of years, a prediction would be a multiple of 8.
    """

    def compute(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return forward(hidden.float())

    return compute


def check_and_describe_model(checked: CheckedModel, settings: Adapter) -> str:
    """Check and describe what would be trained of a model; see `check_and_describe_trainable`."""
    config = read_config(checked.folder, head=checked.head)
    lines = [check_and_describe_trainable(config, settings, checked.head_parameters)]
    if checked.unused:
        kinds = dict.fromkeys(name.split(".")[0] for name in checked.unused)
        lines.append(
            f"not used: {len(checked.unused)} tensors of another head in the files "
            f"({', '.join(kinds)})"
        )
    return "\n".join(lines)


def check_and_describe_trainable(
    config: PretrainedConfig, settings: Adapter, head: Sequence[str] = ()
) -> str:
    """Check what would be trained of a model of `config`, and describe it in a line or two.

    Nothing is loaded: the adapters are attached to a model without storage.

    Raises:
        AstraError: what `attach_trainable` refuses.
    """
    base = make_meta_model(config)
    num_base = sum(parameter.numel() for parameter in base.parameters())
    num_head = sum(base.get_parameter(name).numel() for name in head)
    new = [_describe_head(base, head)] if head else []
    if settings.method_record.trains_all:
        return "\n".join([f"trained: all {num_base:,} parameters", *new])
    match = match_targets(base, settings.targets, settings.exclude)
    lora_ranks = None
    if settings.rank_allocation != "uniform":  # the ranks follow later, and fit
        lora_ranks = {}
        for name, linear in match.linears.items():
            lora_ranks[name] = min(settings.rank, *linear.weight.shape)
    model = attach_trainable(base, settings, lora_ranks, head)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad) - num_head
    kinds = dict.fromkeys(name.rsplit(".", 1)[-1] for name in match.linears)
    lines = [
        f"adapted: {len(match.linears)} modules ({', '.join(kinds)}) with {num_trained:,} "
        f"parameters, {num_trained / num_base:.2%} of the base's {num_base:,}"
    ]
    if match.skipped:
        lines.append(f"not adapted, though a target names it: {_describe_skipped(match.skipped)}")
    return "\n".join([*lines, *new])


def _describe_head(base: PreTrainedModel, head: Sequence[str]) -> str:
    """Say which parameters are new, and whether a pooler stays as it is."""
    num_head = sum(base.get_parameter(name).numel() for name in head)
    outputs = ", ".join(str(name) for name in base.config.id2label.values())
    line = (
        f"new head: {', '.join(head)}, {num_head:,} parameters that the files lack, drawn from "
        f"train.seed and trained whole; outputs: {outputs}"
    )
    poolers = {name.rpartition(".")[0] for name, _ in base.named_parameters() if is_of_pooler(name)}
    frozen = sorted(poolers - {name.rpartition(".")[0] for name in head})
    return f"{line}; {', '.join(frozen)} is the base's" if frozen else line


def _describe_skipped(skipped: Mapping[str, str]) -> str:
    """Describe what bears a target's name but gets no adapter: kinds of names, and why."""
    counts = Counter((abbreviate_name(name), reason) for name, reason in skipped.items())
    parts = [f"{name} ({count}, {reason})" for (name, reason), count in counts.items()]
    more = [f"{len(parts) - NUM_SKIPPED} more kinds"] if len(parts) > NUM_SKIPPED else []
    return "; ".join([*parts[:NUM_SKIPPED], *more])


def draw_new_weights(
    base: PreTrainedModel, checked: CheckedModel, seed: int, engine: Engine
) -> None:
    """Draw the parameters that the base's files lack, alike on all engines. Collective.

    Args:
        base: materialized. It is trained whole, or what is drawn is its new head.
        seed: train.seed.
    """
    for name in checked.new_weights:
        engine.write(
            base.get_parameter(name), draw_weight(checked.folder, name, seed, checked.head)
        )


def find_lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return base-model module name -> PEFT layer; empty where there are no adapters."""
    return get_lora_layers(model) if isinstance(model, PeftModel) else {}


def find_trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> trained parameter in the model's order: what checkpoints hold.

    A tied parameter has its first name. To be called once the engine has sharded the model, since
    FSDP2 puts other parameters in the places of the model's own.
    """
    if isinstance(model, PeftModel):
        return get_trained_parameters(get_lora_layers(model)) | get_head_parameters(model)
    return dict(model.named_parameters())


class ParameterGroup(NamedTuple):
    """Trained parameters that have one learning rate."""

    lr_factor: float  # the learning rate over train.lr, at every step
    parameters: list[nn.Parameter]


def count_trained_parameters(model: nn.Module) -> int:
    """Count the numbers that training changes, over all ranks."""
    return sum(count_elements(p) for p in model.parameters() if p.requires_grad)


def group_parameters(
    model: nn.Module, settings: Train, head: Collection[str] = ()
) -> list[ParameterGroup]:
    """Group the trained parameters by learning rate: each is in exactly one group.

    `factors` names what has a rate of its own, by `_get_kind`; all else has train.lr. What has the
    same rate is one group, in the model's order: with train.lr alone, that of earlier versions, to
    the bit. To be called when `find_trained_parameters` may be.
    """
    factors = {"B": settings.lr_ratio}  # LoRA+, arXiv 2402.12354
    if settings.head_lr is not None:
        factors["head"] = settings.head_lr / settings.lr
    named = find_trained_parameters(model)
    if {*map(id, named.values())} != {id(p) for p in model.parameters() if p.requires_grad}:
        raise ValueError("what is trained is not what find_trained_parameters names")
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        factor = factors.get("head" if name in head else _get_kind(model, name), 1.0)
        groups.setdefault(factor, []).append(parameter)
    return [ParameterGroup(factor, parameters) for factor, parameters in groups.items()]


def _get_kind(model: nn.Module, name: str) -> str | None:
    """Return what a trained parameter is of an adapter: A, B or magnitude; None without adapters."""
    return name.rpartition(".")[2] if isinstance(model, PeftModel) else None


def as_base(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context within which `model`, not initialised yet, computes what its base does."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def choose_smallest(layers: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """Return the layer with the smallest factors, by its name."""

    def measure_factors(name: str) -> int:
        factors = (layers[name].lora_A[ADAPTER].weight, layers[name].lora_B[ADAPTER].weight)
        return sum(count_elements(factor) for factor in factors)

    name = min(layers, key=measure_factors)
    return {name: layers[name]}


def export_trained(
    folder: Path,
    model: nn.Module,
    engine: Engine,
    inputs: Inputs,
    initial: Mapping[str, Factors],
    rehearsal: bool = False,
) -> Path:
    """Write what was trained into the run folder, in PEFT's or transformers' format. Collective.

    Args:
        initial: on rank 0, A0 and B0 by module name.
        rehearsal: try the export: the same code and file names, but only the smallest module or
            layer. Every kind of export must support this, so that a run that cannot be exported
            stops after its first step, not at its end.

    Returns:
        The folder that users load: `lora` or, where there is no plain LoRA, `adapter` or `model`.
    """
    if not isinstance(model, PeftModel):
        save_model(folder / "model", model, engine, inputs, rehearsal)
        return folder / "model"
    layers = get_lora_layers(model)
    if rehearsal:
        layers = choose_smallest(layers)
        initial = {name: factors for name, factors in initial.items() if name in layers}
    trained = read_factors(layers, engine)
    magnitudes = read_magnitudes(layers, engine)
    head = read_head(model, engine)
    config = model.peft_config[ADAPTER]
    run_on_rank0(
        lambda: save_adapters(folder, config, inputs.base, initial, trained, magnitudes, head)
    )
    return folder / ("adapter" if magnitudes else "lora")
