"""Load LoRA adapters from PEFT's files, whoever made them, as plain PEFT loads them.

A whole model is handed to PEFT itself. Into a sharded model the adapter's values are written after
the model has been sharded, which is right only for the fields of PEFT's LoraConfig that neither
read nor change whole weights. A field that is in neither list below is refused, but for one that
PEFT does not know and that is false or empty: SavedAdapter names it.
"""

import json
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import NamedTuple

import peft
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from astra.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from astra.errors import AstraError
from astra.weights import Weights

TASKS = (None, "CAUSAL_LM")

# Fields of LoraConfig that mean the same on whole and on sharded weights, with what only some
# initialisation reads (the initialisation itself is checked below).
ANYWHERE = {
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_dropout",
    "lora_bias",
    "bias",
    "fan_in_fan_out",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",  # without megatron_config a name alone
    "qalora_group_size",  # of use_qalora
    "runtime_config",  # PEFT does not read it from files
    "eva_config",
    "corda_config",
    "loftq_config",
    "lora_ga_config",
}
# Fields for which PEFT copies, reads or changes whole weights or whole layers.
ON_WHOLE_WEIGHTS = {
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "ensure_weight_tying",
    "use_bdlora",
    "kasa_config",
    "velora_config",  # only its backward pass differs
}
# Values of init_lora_weights. PEFT sets the factors and leaves the base alone, or changes the base
# too, alike at every load.
INITS_OF_FACTORS = {"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"}
INITS_OF_THE_BASE = {"pissa", "olora", "loftq"}

PEFT_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
    pickle.UnpicklingError,
    re.error,
)


class SavedAdapter(NamedTuple):
    """A LoRA in PEFT's files that has been checked against the model it is for."""

    folder: Path
    config: LoraConfig
    values: dict[str, Tensor]  # name in PEFT's model -> its value in the file
    unknown: tuple[str, ...] = ()  # fields that this PEFT does not know, false or empty in the file


def read_saved_adapter(folder: Path, empty: nn.Module, sharded: bool) -> SavedAdapter:
    """Read the adapter in `folder` and check that it can be loaded as plain PEFT loads it.

    Args:
        empty: the base model without values, on the meta device. PEFT's layers are put into it.
        sharded: whether the model that is to have the adapter is sharded.

    Raises:
        AstraError: the files are damaged or no LoRA's; a field is not supported; the file of values
            has one that the model with this config has not, or lacks one.
    """
    config, unknown = _read_config(folder, sharded)
    if not any((folder / name).is_file() for name in ADAPTER_WEIGHTS):
        raise AstraError(f"{folder} has no {ADAPTER_WEIGHTS[0]}", "adapter")
    # PEFT renames and converts the file's keys. With plain factors instead of the initialisation's
    # nothing is computed, and the names stay the same.
    config.init_lora_weights = True
    config.inference_mode = False  # trained parameters are then those that require gradients
    with _reporting(folder):
        model = get_peft_model(empty, config, low_cpu_mem_usage=True)
        values, unexpected = _assign_names(model, load_peft_weights(str(folder), device="cpu"))
    _check_names(folder, model, values, unexpected)
    if sharded:
        _check_sharded(folder, model, values)
    return SavedAdapter(folder, config, values, unknown)


def _read_config(folder: Path, sharded: bool) -> tuple[LoraConfig, tuple[str, ...]]:
    """Read adapter_config.json and check all its fields.

    Returns:
        The config, and the names of the fields that this PEFT does not know, which are off.

    Raises AstraError.
    """
    path = folder / ADAPTER_CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind = raw["peft_type"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise AstraError(f"{path} cannot be read: {_first_line(error)}", "adapter") from None
    if kind != PeftType.LORA:
        raise AstraError(
            f"{folder} is a {kind} adapter, not a LoRA; it cannot be loaded", "adapter"
        )
    if raw.get("task_type") not in TASKS:
        raise AstraError(
            f"{folder} is for the task {raw['task_type']}, not for a causal language model",
            "adapter",
        )
    defaults = {}
    for field in fields(LoraConfig):
        has_factory = field.default_factory is not MISSING
        defaults[field.name] = field.default_factory() if has_factory else field.default
    for name, value in raw.items():
        _check_field(folder, name, value, defaults, sharded)
    _check_init(folder, raw.get("init_lora_weights", True), sharded)
    unknown = tuple(sorted(raw.keys() - defaults.keys() - ANYWHERE))
    with _reporting(folder):
        return PeftConfig.from_pretrained(str(folder)), unknown


def _check_field(folder: Path, name: str, value: object, defaults: dict, sharded: bool) -> None:
    """Check that one field of an adapter's config is understood. Raises AstraError."""
    if name in ANYWHERE or name in ("task_type", "init_lora_weights"):
        return
    if name not in defaults:
        # Newer versions write every field, also those that are off.
        if value:
            raise AstraError(
                f"{folder} sets {name}, which PEFT {peft.__version__} does not know", "adapter"
            )
        return
    if value == defaults[name] or (not value and not defaults[name]):
        return
    if name not in ON_WHOLE_WEIGHTS:
        raise AstraError(f"{folder} sets {name}, which is not supported", "adapter")
    if sharded:
        raise AstraError(f"{folder} sets {name}, not supported on sharded weights", "sharded")


def _check_init(folder: Path, init: object, sharded: bool) -> None:
    """Check what PEFT does with the base at `init_lora_weights`. Raises AstraError."""
    name = str(init).lower()
    if name in INITS_OF_FACTORS:
        return
    field = f"{folder} has init_lora_weights {init}"
    if name in INITS_OF_THE_BASE:
        if sharded:
            raise AstraError(
                f"{field}, for which PEFT changes whole weights, not supported on sharded ones",
                "sharded",
            )
        return
    reason = "which is not supported"
    if name.startswith(("pissa", "corda", "lora_ga")):
        reason = "and PEFT cannot rebuild from it the base that it was trained on"
    raise AstraError(
        f"{field}, {reason}; save it with PEFT's path_initial_model_for_weight_conversion",
        "adapter",
    )


def _assign_names(
    model: PeftModel, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the file's tensors by their names in `model`, and the names that it has not.

    PEFT finds the names as it loads: what it hands to load_state_dict is kept. Shapes are checked.
    """
    values: dict[str, Tensor] = {}
    load = model.load_state_dict

    def keep(state_dict: dict[str, Tensor], **options: bool) -> object:
        values.update(state_dict)
        return load(state_dict, **options)

    model.load_state_dict = keep
    with warnings.catch_warnings():
        # Of every value, that it was not copied into a model without values.
        warnings.simplefilter("ignore", UserWarning)
        result = set_peft_model_state_dict(model, tensors)
    return values, result.unexpected_keys


def _check_names(
    folder: Path, model: PeftModel, values: dict[str, Tensor], unexpected: list[str]
) -> None:
    """Check that the file holds all that the adapter trains, and nothing else. Raises AstraError."""
    found, wanted = set(), {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad or "lora_" in name:
            wanted[id(parameter)] = name
        if name in values:
            found.add(id(parameter))
    missing = [name for key, name in wanted.items() if key not in found]
    for what, names in (("has", unexpected), ("lacks", missing)):
        if names:
            raise AstraError(
                f"{folder} does not fit the model and its {ADAPTER_CONFIG}: it {what} {sorted(names)[0]}",
                "adapter",
            )


def _check_sharded(folder: Path, model: PeftModel, values: dict[str, Tensor]) -> None:
    """Check that a sharded model can run the adapter's layers and take its values.

    Raises AstraError.
    """
    buffers = values.keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if buffers:
        raise AstraError(
            f"{folder} sets {min(buffers)}, a buffer, not supported on sharded weights", "sharded"
        )
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and not isinstance(
            module.get_base_layer(), nn.Linear | Conv1D
        ):
            kind = type(module.get_base_layer()).__name__
            raise AstraError(
                f"{folder} adapts {name}, a {kind}, not supported on sharded weights", "sharded"
            )


def load_saved_adapter(model: nn.Module, saved: SavedAdapter) -> PeftModel:
    """Return `model`, which is whole, with the adapter, by PEFT itself.

    For some initialisations PEFT changes the base here.
    """
    device = next(model.parameters()).device  # by default PEFT reads it onto the first GPU
    with _reporting(saved.folder):
        return PeftModel.from_pretrained(model, str(saved.folder), torch_device=str(device))


def attach_saved_adapter(model: nn.Module, saved: SavedAdapter) -> PeftModel:
    """Return `model` with the layers of the adapter, without their values.

    write_saved_adapter sets the values. An engine may shard the model between the two calls.
    """
    with _reporting(saved.folder):
        return get_peft_model(model, saved.config)


def write_saved_adapter(model: PeftModel, saved: SavedAdapter, weights: Weights) -> None:
    """Set the adapter of `model` to its values. Collective."""
    for name, value in saved.values.items():
        weights.write(model.get_parameter(name), value)


@contextmanager
def _reporting(folder: Path) -> Iterator[None]:
    """Turn an error of PEFT into one line. Memory that ran out is no error of the adapter."""
    try:
        yield
    except (AstraError, torch.OutOfMemoryError):
        raise
    except PEFT_ERRORS as error:
        raise AstraError(f"PEFT cannot load {folder}: {_first_line(error)}", "adapter") from None


def _first_line(error: Exception) -> str:
    """Return an error's text in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
