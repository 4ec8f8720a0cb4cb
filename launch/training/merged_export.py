"""merged/: the whole model with the trained adapter merged into its weights."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from astra.adapter import ADAPTER, Factors, get_lora_layers, merge_factors
from astra.weights import Weights
from launch.data.inputs import Inputs
from launch.engines import Engine
from launch.runtime.distributed import run_on_rank0
from launch.training.model_export import (
    Description,
    describe_weights,
    read_weight,
    write_config,
    write_weights,
)
from launch.training.trainable import choose_smallest

FOLDER = "merged"
UNFINISHED = "merged.tmp"  # its name until it is whole
INSIDE = ".base_layer."  # PEFT's name of the frozen module inside a LoRA layer


def save_merged(
    folder: Path, model: PeftModel, engine: Engine, inputs: Inputs, rehearsal: bool = False
) -> None:
    """Write `W_res + s B A` and all other weights of the base in transformers' format. Collective.

    Merged weights are computed in fp64 and rounded once.

    Args:
        rehearsal: only try it: one weight is merged, and see `write_weights`.
    """
    base, layers = model.get_base_model(), get_lora_layers(model)
    sources = _find_sources(base, layers)

    def read(name: str) -> Tensor:
        owner, _, attribute = name.rpartition(".")
        if attribute == "weight" and owner in layers:
            return compute_merged(layers[owner], engine)
        return read_weight(base, engine, sources[name])

    if rehearsal:
        for layer in choose_smallest(layers).values():
            compute_merged(layer, engine)
    weights = describe_merged(model, inputs.dtype)
    unfinished = folder / UNFINISHED
    run_on_rank0(lambda: remove_merged(folder))
    write_weights(unfinished, base, weights, read, rehearsal)
    run_on_rank0(lambda: write_config(inputs.model_path, unfinished, inputs.dtype, inputs.head))
    run_on_rank0(lambda: unfinished.rename(folder / FOLDER))


def remove_merged(folder: Path) -> None:
    """Remove merged/ of an earlier start, whole or not, from the run folder. Rank 0 calls it."""
    for name in (FOLDER, UNFINISHED):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)


def describe_merged(model: PeftModel, dtype: torch.dtype) -> Description:
    """Describe what merged/ holds: the base's weights, each in the dtype that it has there.

    Args:
        dtype: of the base. transformers keeps some weights in fp32.
    """
    base = model.get_base_model()
    parameters, whole = dict(base.named_parameters()), describe_weights(base, dtype)
    weights = {}
    for name, source in _find_sources(base, get_lora_layers(model)).items():
        own = parameters[source].dtype if source in parameters else whole[source].dtype
        weights[name] = whole[source].to(own)
    return weights


def _find_sources(base: PreTrainedModel, layers: Mapping[str, LoraLayer]) -> dict[str, str]:
    """Return the names of the base's own weights: without PEFT's layers -> with them."""
    sources = {}
    for name in describe_weights(base, torch.float32):
        plain = name.replace(INSIDE, ".")
        owner = plain.rpartition(".")[0]
        # What is in a LoRA layer, but not in its base, is the adapter's.
        if INSIDE in name or not any(f"{owner}.".startswith(f"{layer}.") for layer in layers):
            sources[plain] = name
    return sources


@torch.no_grad()
def compute_merged(layer: LoraLayer, weights: Weights) -> Tensor:
    """Return a layer's merged weight in fp64, (d_out, d_in). Collective."""
    # In fp64 at once, which frees the copy that was read.
    weight = weights.read(layer.base_layer.weight).double()
    factors = Factors(
        weights.read(layer.lora_A[ADAPTER].weight), weights.read(layer.lora_B[ADAPTER].weight)
    )
    magnitude = None
    if ADAPTER in layer.lora_magnitude_vector:
        magnitude = weights.read(layer.lora_magnitude_vector[ADAPTER].weight)
    return merge_factors(weight, factors, layer.scaling[ADAPTER], magnitude)
