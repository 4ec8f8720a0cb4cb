"""Adapters in PEFT's LoRA layers of a model that may be sharded, and in PEFT's file format.

The adapter of a module with weight W is `dW = s B A`, with A (r, d_in), B (d_out, r) and the
scaling s = alpha / r. Training starts at factors A0 and B0 whose product need not be zero.
Therefore W is replaced by `W_res = W - s B0 A0`, so that the model's output stays as it was.
Training changes A and B, and `W_res + s B A` is the merged weight. On the original W the same
change is `s (B A - B0 A0)`: a plain LoRA of rank 2r (astra.plain_lora).
"""

import copy
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from astra.errors import AstraError
from astra.moments import is_distributed
from astra.targets import POOLER, find_targets, is_of_pooler, make_peft_targets
from astra.weights import Weights

ADAPTER = "default"  # PEFT's name for a model's only adapter
PREFIX = "base_model.model."  # of module names in PEFT's files
# PEFT's names for the files of an adapter. Of the values it takes the first file that is there.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


class Factors(NamedTuple):
    """The factors of one module's adapter `dW = s B A`."""

    a: Tensor  # (r, d_in)
    b: Tensor  # (d_out, r)


def attach_adapters(
    model: nn.Module,
    targets: list[str],
    lora_rank: int,
    alpha: float,
    dropout: float,
    lora_ranks: Mapping[str, int] | None = None,
    rslora: bool = False,
    dora: bool = False,
    exclude: Sequence[str] = (),
    head: Sequence[str] = (),
) -> PeftModel:
    """Return `model` with PEFT's LoRA layers at `targets`; initialise_layers sets their values.

    Args:
        lora_ranks: module name -> r, if not all are `lora_rank`. All modules have the same scaling,
            s = alpha / lora_rank.
        rslora: s = alpha / sqrt(lora_rank) instead (arXiv 2312.03732).
        dora: train a magnitude for each row, and take only the row's direction from W + dW (arXiv
            2402.09353).
        exclude: what targets name but gets no adapter (astra.targets).
        head: parameters of a new head, which are trained whole, beside the adapters, in fp32 or in
            the base's dtype. In PEFT's config they are the modules_to_save.

    Raises:
        AstraError: find_targets or PEFT refuses a target, or a rank is above the smaller side of
            its module.
    """
    linears = find_targets(model, targets, exclude)
    lora_ranks = lora_ranks or dict.fromkeys(linears, lora_rank)
    for name, linear in linears.items():
        smaller = min(linear.in_features, linear.out_features)
        if lora_ranks[name] > smaller:
            raise AstraError(
                f"{lora_ranks[name]} is above the smaller side, {smaller}, of {name}; lower it, or "
                "exclude the module",
                "rank",
            )
    # PEFT takes the ranks that differ from r as a pattern, and their alphas, which keep s alike.
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for name, own_rank in lora_ranks.items():
        if own_rank != lora_rank:
            rank_pattern[name] = own_rank
            alpha_pattern[name] = alpha * own_rank / lora_rank
    config = LoraConfig(
        r=lora_rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=make_peft_targets(model, targets, linears),
        task_type="CAUSAL_LM",
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        use_rslora=rslora,
        use_dora=dora,
    )
    if head:
        config.task_type = None  # PEFT would keep two copies of the head
    try:
        attached = get_peft_model(model, config)
    except ValueError as error:  # of a module that PEFT knows to be wrong for an adapter
        refused = re.search(r"Module '([\w.]+)'", str(error))
        hint = f"leave {refused[1]} out, or exclude it" if refused else "choose other targets"
        raise AstraError(
            f"PEFT refuses it: {str(error).splitlines()[0]}; {hint}", "targets"
        ) from None
    if head:
        config.task_type = "SEQ_CLS"
        config.modules_to_save = list(dict.fromkeys(_name_saved_module(name) for name in head))
        for name in head:
            model.get_parameter(name).requires_grad_(True)
    return attached


def _name_saved_module(name: str) -> str:
    """Return the module that PEFT saves for a parameter: its pooler, or the part below the model.

    PEFT takes the names for ends of names, and adds `classifier` and `score` by itself.
    """
    parts = name.split(".")
    if is_of_pooler(name):
        return ".".join(parts[: parts.index(POOLER) + 1])
    return parts[0]


def get_head_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Return the trained parameters outside of the adapters, a new head's, by name in the base."""
    of_adapters = set()
    for layer in get_lora_layers(model).values():
        of_adapters |= {id(parameter) for parameter in layer.parameters()}
    named = {}
    for name, parameter in model.get_base_model().named_parameters():
        if parameter.requires_grad and id(parameter) not in of_adapters:
            named[name] = parameter
    return named


def get_lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Return PEFT's LoRA layers by their module's name in the base model, in the model's order."""
    layers = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            layers[name] = module
    return layers


def get_base_layers(layers: Mapping[str, LoraLayer]) -> dict[str, nn.Linear]:
    """Return the frozen nn.Linear inside each of PEFT's LoRA layers, by module name."""
    return {name: layer.base_layer for name, layer in layers.items()}


def get_trained_parameters(layers: Mapping[str, LoraLayer]) -> dict[str, nn.Parameter]:
    """Return the trained parameters in the model's order.

    Their names are `{module}.A`, `{module}.B` and, for DoRA, `{module}.magnitude`.
    """
    named = {}
    for name, layer in layers.items():
        named[f"{name}.A"] = layer.lora_A[ADAPTER].weight
        named[f"{name}.B"] = layer.lora_B[ADAPTER].weight
        for vector in layer.lora_magnitude_vector.values():
            named[f"{name}.magnitude"] = vector.weight
    return named


def initialise_layers(
    layers: Mapping[str, LoraLayer],
    make_factors: Callable[[str, Tensor], tuple[Tensor, Tensor]],
    weights: Weights,
) -> float:
    """Write A0, B0, `W_res = W - s B0 A0` and DoRA's magnitudes into every layer. Collective.

    The product is formed in fp64 from the factors as stored, rounded to their parameters' dtype.
    W_res is rounded once, to the base's dtype.

    Args:
        make_factors: (module name, whole W) -> fp64 (A0, B0), identical on every rank.

    Returns:
        The largest `|s B0 A0 + W_res - W| / |W|` (Frobenius norms) of any module: at most 2^-8 in
        bf16, and 0 if B0 = 0.
    """
    worst = 0.0
    for name, layer in layers.items():
        weight = weights.read(layer.base_layer.weight)
        a_parameter = layer.lora_A[ADAPTER].weight
        b_parameter = layer.lora_B[ADAPTER].weight
        a0, b0 = make_factors(name, weight)
        # Rounded as they are stored, so that W_res lacks exactly what the adapter adds.
        a0, b0 = a0.to(a_parameter.dtype), b0.to(b_parameter.dtype)
        weights.write(a_parameter, a0)
        weights.write(b_parameter, b0)
        product = layer.scaling[ADAPTER] * (b0.double() @ a0.double())
        if product.any():
            residual = (weight.double() - product).to(weight.dtype)
            weights.write(layer.base_layer.weight, residual)
            # In one expression: a name would keep another fp64 copy of W alive.
            error = (product + residual.double() - weight.double()).norm() / weight.double().norm()
            worst = max(worst, error.item())
        for vector in layer.lora_magnitude_vector.values():
            # PEFT divides by the same norm in the forward pass: the ratio is exactly 1. It does so in
            # the factors' dtype, and its function rounds the norm to the dtype of what it is given.
            whole = weight.to(vector.weight.dtype)
            norms = vector.get_weight_norm(whole, torch.zeros_like(whole), 1)
            weights.write(vector.weight, norms)
    return worst


def merge_factors(
    weight: Tensor, factors: Factors, scaling: float, magnitude: Tensor | None = None
) -> Tensor:
    """Return a module's merged weight `W + s B A` in fp64, (d_out, d_in), on W's device.

    The product is formed in fp64 on the factors' device.

    Args:
        weight: W.
        magnitude: DoRA's m, (d_out,). The rows are then those of m (W + s B A) / |W + s B A|, as PEFT
            merges it.
    """
    a, b = factors
    merged = weight.double() + scaling * (b.double() @ a.double()).to(weight.device)
    if magnitude is not None:
        merged *= (magnitude.to(merged) / merged.norm(dim=1))[:, None]
    return merged


def read_factors(layers: Mapping[str, LoraLayer], weights: Weights) -> dict[str, Factors]:
    """Return the whole A and B of every layer, on the CPU, in their stored dtype. Collective.

    Only rank 0 writes them to files. To save memory the result is empty on the other ranks.
    """
    is_rank0 = not is_distributed() or dist.get_rank() == 0
    factors = {}
    for name, layer in layers.items():
        a = weights.read(layer.lora_A[ADAPTER].weight)
        b = weights.read(layer.lora_B[ADAPTER].weight)
        if is_rank0:
            factors[name] = Factors(a.cpu(), b.cpu())
    return factors


def read_magnitudes(layers: Mapping[str, LoraLayer], weights: Weights) -> dict[str, Tensor]:
    """Return DoRA's whole magnitudes, (d_out,), of every layer, on the CPU. Collective.

    Empty for other adapters.
    """
    magnitudes = {}
    for name, layer in layers.items():
        for vector in layer.lora_magnitude_vector.values():
            magnitudes[name] = weights.read(vector.weight).cpu()
    return magnitudes


def read_head(model: PeftModel, weights: Weights) -> dict[str, Tensor]:
    """Return the whole parameters of a new head, on the CPU; empty without one. Collective."""
    head = {}
    for name, parameter in get_head_parameters(model).items():
        head[name] = weights.read(parameter).cpu()
    return head


def save_adapter(
    folder: Path,
    config: LoraConfig,
    base: str,
    factors: Mapping[str, Factors],
    magnitudes: Mapping[str, Tensor] | None = None,
    head: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `factors` to `folder` in PEFT's format, for the base model `base`.

    `head`, parameters of the base by name, is written as the modules that PEFT saves beside the
    factors. `config` is written as it is, but for `init_lora_weights`: that is PEFT's default,
    because PEFT changes the base when it loads a config that names a data-driven initialisation.
    """
    config = copy.deepcopy(config)
    config.base_model_name_or_path = base
    config.init_lora_weights = True
    config.inference_mode = True
    config.modules_to_save = config.modules_to_save if head else None
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous()
    for name, magnitude in (magnitudes or {}).items():
        tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = magnitude.contiguous()
    for name, value in (head or {}).items():
        tensors[f"{PREFIX}{name}"] = value.contiguous()
    save_file(tensors, folder / ADAPTER_WEIGHTS[0], metadata={"format": "pt"})


def load_adapter(folder: Path) -> tuple[dict[str, Factors], float]:
    """Return the factors that save_adapter wrote to `folder`, and their scaling s."""
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    tensors = load_file(folder / ADAPTER_WEIGHTS[0])
    factors = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            factors[stem.removeprefix(PREFIX)] = Factors(a, tensors[f"{stem}.lora_B.weight"])
    divisor = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    return factors, config["lora_alpha"] / divisor


def subtract_initial(
    model: nn.Module, initial: Mapping[str, Factors], scaling: float, weights: Weights
) -> None:
    """Turn the original base into `W_res = W - s B0 A0`, as initialise_layers does. Collective.

    The result has the same bits, because A0 and B0 are those that were stored.

    Args:
        initial: module name -> A0, B0.
        scaling: s.
    """
    for name, (a0, b0) in initial.items():
        module = model.get_submodule(name)
        parameter = getattr(module, "base_layer", module).weight
        weight = weights.read(parameter)
        a0, b0 = a0.to(weight.device), b0.to(weight.device)  # where initialise_layers has them
        product = scaling * (b0.double() @ a0.double())
        weights.write(parameter, (weight.double() - product).to(weight.dtype))
