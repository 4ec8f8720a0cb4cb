"""Initial factors into PEFT's LoRA layers of a (sharded) model, and trained factors out of them into PEFT's format."""

import copy
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from astra.errors import AstraError
from astra.weights import Weights

ADAPTER = "default"  # PEFT's name of a model's only adapter


class Factors(NamedTuple):
    """One module's adapter: `dW = s B A`."""

    a: Tensor  # (r, d_in)
    b: Tensor  # (d_out, r)


def find_targets(model: nn.Module, targets: list[str]) -> dict[str, nn.Linear]:
    """The linear modules whose name is, or ends with a dot and, one of `targets`; in the model's order.

    Raises AstraError for a target that matches nothing, that is no nn.Linear, or whose weight is tied to another
    module's (changing it to `W_res` would change the other).
    """
    ends = {target: f".{target}" for target in targets}
    found: dict[str, nn.Linear] = {}
    matched = set()
    owners: dict[int, int] = {}
    for parameter in (p for m in model.modules() for p in m.parameters(recurse=False)):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, module in model.named_modules():
        hits = {target for target, end in ends.items() if name == target or name.endswith(end)}
        if not hits:
            continue
        if not isinstance(module, nn.Linear):
            raise AstraError(
                f"adapter.targets: {name} is a {type(module).__name__}, not a linear layer; leave it out"
            )
        if owners[id(module.weight)] > 1:
            raise AstraError(
                f"adapter.targets: the weight of {name} is tied to another module; leave it out"
            )
        matched |= hits
        found[name] = module
    for target in targets:
        if target not in matched:
            known = sorted(
                {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
            )
            raise AstraError(
                f"adapter.targets: {target!r} matches no module; linear modules here: {', '.join(known)}"
            )
    return found


def attach(
    model: nn.Module,
    targets: list[str],
    rank: int,
    alpha: float,
    dropout: float,
    ranks: Mapping[str, int] | None = None,
    rslora: bool = False,
    dora: bool = False,
) -> PeftModel:
    """`model` with PEFT's LoRA layers at `targets`, whose values `initialise` sets.

    Args:
        ranks: of every module, where they are not all `rank`; the scaling is s = alpha / rank in all of them.
        rslora: s = alpha / sqrt(rank) (arXiv 2312.03732).
        dora: rows of W + dW have the direction only, and a trained magnitude (arXiv 2402.09353).

    Raises AstraError where find_targets does, or if a rank is above its module's smaller side.
    """
    linears = find_targets(model, targets)
    ranks = ranks or dict.fromkeys(linears, rank)
    for name, linear in linears.items():
        smaller = min(linear.in_features, linear.out_features)
        if ranks[name] > smaller:
            raise AstraError(
                f"adapter.rank: {ranks[name]} is above the smaller side, {smaller}, of {name}; lower it"
            )
    others = {name: number for name, number in ranks.items() if number != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        rank_pattern=others,
        alpha_pattern={name: alpha * number / rank for name, number in others.items()},
        use_rslora=rslora,
        use_dora=dora,
    )
    return get_peft_model(model, config)


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Base-model module name -> PEFT layer, in the model's order."""
    return {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }


def parameters(layers: Mapping[str, LoraLayer]) -> dict[str, nn.Parameter]:
    """`{module}.A`, `{module}.B` and, of DoRA, `{module}.magnitude` -> trained parameter, in the model's order."""
    named = {}
    for name, layer in layers.items():
        named[f"{name}.A"] = layer.lora_A[ADAPTER].weight
        named[f"{name}.B"] = layer.lora_B[ADAPTER].weight
        for vector in layer.lora_magnitude_vector.values():
            named[f"{name}.magnitude"] = vector.weight
    return named


def initialise(
    layers: Mapping[str, LoraLayer],
    factors: Callable[[str, Tensor], tuple[Tensor, Tensor]],
    weights: Weights,
) -> float:
    """Set A0, B0 and `W_res = W - s B0 A0` in every layer, in place; of DoRA also its magnitudes, W's row norms.

    Collective. The product is formed in fp64 from the factors exactly as stored (their parameter's dtype), and W_res
    rounded to the base's dtype once.

    Args:
        factors: (module name, whole W) -> fp64 (A0, B0), alike on every rank.

    Returns:
        The largest `|s B0 A0 + W_res - W| / |W|` (Frobenius) over the modules: at most 2^-8 in bf16, 0 for B0 = 0.
    """
    worst = 0.0
    for name, layer in layers.items():
        weight = weights.read(layer.base_layer.weight)
        a_parameter, b_parameter = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        a0, b0 = factors(name, weight)
        a0, b0 = a0.to(a_parameter.dtype), b0.to(b_parameter.dtype)
        weights.write(a_parameter, a0)
        weights.write(b_parameter, b0)
        product = layer.scaling[ADAPTER] * (b0.double() @ a0.double())
        if product.any():
            residual = (weight.double() - product).to(weight.dtype)
            weights.write(layer.base_layer.weight, residual)
            error = (product + residual.double() - weight.double()).norm() / weight.double().norm()
            worst = max(worst, error.item())
        for vector in layer.lora_magnitude_vector.values():
            # PEFT's own function and dtype, so that its forward pass finds the very same norm: a ratio of exactly 1.
            weights.write(
                vector.weight, vector.get_weight_norm(weight, torch.zeros_like(weight), 1)
            )
    return worst


def read_factors(layers: Mapping[str, LoraLayer], weights: Weights) -> dict[str, Factors]:
    """The whole A and B of every layer, on the CPU, in their stored dtype. Collective."""
    return {
        name: Factors(
            weights.read(layer.lora_A[ADAPTER].weight).cpu(),
            weights.read(layer.lora_B[ADAPTER].weight).cpu(),
        )
        for name, layer in layers.items()
    }


def to_plain_lora(
    trained: Mapping[str, Factors], initial: Mapping[str, Factors]
) -> dict[str, Factors]:
    """`s (B A - B0 A0)` as a rank-2r LoRA of the ORIGINAL base: A' = [A; A0], B' = [B, -B0].

    Exact: no product is rounded. Its scaling must stay s, so alpha doubles with the rank.
    """
    return {
        name: Factors(torch.cat([a, initial[name].a]), torch.cat([b, -initial[name].b], 1))
        for name, (a, b) in trained.items()
    }


def read_magnitudes(layers: Mapping[str, LoraLayer], weights: Weights) -> dict[str, Tensor]:
    """DoRA's whole magnitude vector (d_out,) of every layer, on the CPU; empty for other adapters. Collective."""
    return {
        name: weights.read(vector.weight).cpu()
        for name, layer in layers.items()
        for vector in layer.lora_magnitude_vector.values()
    }


def save(
    folder: Path,
    config: LoraConfig,
    base: str,
    factors: Mapping[str, Factors],
    magnitudes: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `factors` in PEFT's format (adapter_config.json, adapter_model.safetensors) for the base model `base`.

    The ranks are the factors' own and alpha grows with them, so that s stays. `init_lora_weights` is the plain one:
    PEFT changes the base when it loads a config that names a data-driven initialisation.
    """
    config = copy.deepcopy(config)
    name, (a, _) = next(iter(factors.items()))
    times = len(a) // config.rank_pattern.get(name, config.r)
    grown = math.sqrt(times) if config.use_rslora else times
    config.r, config.lora_alpha = times * config.r, grown * config.lora_alpha
    config.rank_pattern = {name: times * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: grown * alpha for name, alpha in config.alpha_pattern.items()}
    config.base_model_name_or_path = base
    config.init_lora_weights, config.inference_mode = True, True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    for name, magnitude in (magnitudes or {}).items():
        tensors[f"base_model.model.{name}.lora_magnitude_vector"] = magnitude.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> tuple[dict[str, Factors], float]:
    """The factors that `save` wrote to `folder`, and their scaling s."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    ends = (".lora_A.weight", ".lora_B.weight")
    names = [
        key.removeprefix("base_model.model.").removesuffix(ends[0])
        for key in tensors
        if key.endswith(ends[0])
    ]
    factors = {
        name: Factors(*(tensors[f"base_model.model.{name}{end}"] for end in ends)) for name in names
    }
    return factors, config["lora_alpha"] / (
        math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    )


def attach_saved(model: nn.Module, folder: Path) -> PeftModel:
    """`model` with the layers of the PEFT LoRA in `folder`, whose values `write_saved` sets once they have storage."""
    config = PeftConfig.from_pretrained(folder)
    if config.peft_type != PeftType.LORA:
        raise AstraError(
            f"--adapter: {folder} is a {config.peft_type.value} adapter, not a LoRA; it cannot be loaded"
        )
    config.init_lora_weights = True  # PEFT would change the base for a data-driven initialisation
    return get_peft_model(model, config)


def write_saved(model: PeftModel, folder: Path, weights: Weights) -> None:
    """Set the LoRA factors of `model` to those in `folder`. Collective.

    Raises AstraError unless `folder` holds just the factors that its own config names.
    """
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise AstraError(f"--adapter: {folder} has no {path.name}")
    wanted = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    ends = r"(?:\.weight|(?<=lora_magnitude_vector))$"  # PEFT leaves .weight out after the latter
    found = {
        re.sub(ends, f".{ADAPTER}.weight", key): value for key, value in load_file(path).items()
    }
    if odd := sorted(found.keys() ^ wanted.keys()):
        raise AstraError(
            f"--adapter: {path} does not fit the model and adapter_config.json: {odd[0]}"
        )
    for name, parameter in wanted.items():
        weights.write(parameter, found[name])


def subtract(
    model: nn.Module, initial: Mapping[str, Factors], scaling: float, weights: Weights
) -> None:
    """Turn the original base into `W_res`, rebuilt from the stored A0, B0 as `initialise` made it. Collective."""
    for name, (a0, b0) in initial.items():
        module = model.get_submodule(name)
        parameter = getattr(module, "base_layer", module).weight
        weight = weights.read(parameter)
        product = scaling * (b0.double() @ a0.double()).to(weight.device)
        weights.write(parameter, (weight.double() - product).to(weight.dtype))


def base_layers(layers: Mapping[str, LoraLayer]) -> dict[str, nn.Linear]:
    """Base-model module name -> the frozen linear layer inside the PEFT layer."""
    return {name: layer.base_layer for name, layer in layers.items()}
