"""What computes the same numbers faster, where it is installed: attention kernels, Liger, torch.compile."""

import importlib.util
import os
import shutil

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_flash_attn_2_available

from launch.config.schema import Recipe
from launch.engines.base import Engine
from launch.runtime.distributed import all_reduce_max
from launch.runtime.errors import UserError
from launch.training.loss import leak


def require(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError if this machine lacks what `recipe` asks for."""
    gpu = device.type == "cuda"
    if recipe.model.attention == "flash_attention_2":
        if dtype != torch.bfloat16 or not gpu:
            raise UserError(
                "model.attention: flash_attention_2 needs a GPU and model.dtype=bfloat16; set sdpa"
            )
        if not is_flash_attn_2_available():
            raise UserError(
                "model.attention: flash_attention_2 is not installed; pip install flash-attn, or set sdpa"
            )
    if recipe.train.compile and not gpu and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError(
            "train.compile: needs a C++ compiler; apt-get install g++, or set train.compile=false"
        )
    if recipe.train.liger:
        if not gpu:
            raise UserError("train.liger: its kernels need a GPU; set train.liger=false")
        if importlib.util.find_spec("liger_kernel") is None:
            raise UserError(
                "train.liger: not installed; pip install liger-kernel, or set train.liger=false"
            )


def require_packing(engine: Engine, model: nn.Module) -> None:
    """Raises UserError, on every rank, if `model` lets packed examples see one another. Collective."""
    with engine.inference(model):
        moved = all_reduce_max(leak(model, engine.device), engine.device)
    if not moved <= 1e-6:  # it is 0, but for rounding where experts batch tokens
        raise UserError(
            f"data.packing: an example's loss moves by {moved:.1e} with the one packed before it: this model's "
            "attention does not keep them apart; set data.packing=false"
        )


def put_in(base: PreTrainedModel, recipe: Recipe) -> None:
    """The attention that `recipe` names, unless it is `auto`, and Liger's kernels if it asks for them, into `base`."""
    attention = recipe.model.attention
    if attention != "auto":
        try:
            base.set_attn_implementation(attention)
        except (ValueError, ImportError) as error:
            raise UserError(f"model.attention: {str(error).splitlines()[0]}") from None
        if base.config._attn_implementation != attention:
            raise UserError(f"model.attention: {type(base).__name__} cannot change it; set auto")
    if not recipe.train.liger:
        return
    try:  # the loss stays ours, which computes fewer logits
        apply_liger_kernel(base, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    except (ImportError, TypeError) as error:
        raise UserError(
            f"train.liger: not for this model: {error}; set train.liger=false"
        ) from None


def compile_layers(base: PreTrainedModel) -> list[nn.Module]:
    """Have each decoder layer compiled when it first runs, alike for rows of all lengths; the layers."""
    layers = [
        module
        for module in base.modules()
        if type(module).__name__.removeprefix("FSDP") in base._no_split_modules
    ]
    for layer in layers:
        layer.compile(dynamic=True)
    return layers


def uncompile(layers: list[nn.Module]) -> None:
    """Run `layers` as they were written again."""
    for layer in layers:
        layer._compiled_call_impl = None
