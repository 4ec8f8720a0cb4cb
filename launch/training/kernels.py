"""What computes the same numbers faster: attention kernels, packing, Liger's kernels, torch.compile."""

import importlib.util
import os
import shutil
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_flash_attn_2_available

from launch.config.schema import Recipe
from launch.data.inputs import Inputs
from launch.data.order import Packing
from launch.data.token_set import TokenSet
from launch.engines.base import Engine
from launch.models.check import read_config
from launch.runtime.compat.torch_parts import undo_compile
from launch.runtime.compat.transformers_parts import list_layer_classes, read_attention
from launch.runtime.distributed import all_reduce_max
from launch.runtime.errors import UserError, read_first_line
from launch.training.loss import measure_packing_leak

MAX_LEAK = 1e-6  # relative; it is 0, but for rounding where experts batch tokens


def require_kernels(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError if this machine lacks what `recipe` asks for."""
    is_gpu = device.type == "cuda"
    if recipe.model.attention == "flash_attention_2":
        is_new = is_gpu and torch.cuda.get_device_capability(device) >= (8, 0)
        if dtype != torch.bfloat16 or not is_new:
            raise UserError(
                "model.attention: flash_attention_2 needs model.dtype=bfloat16 and a GPU of compute "
                "capability 8.0 or later (A100, RTX 30); set sdpa"
            )
        if not is_flash_attn_2_available():
            raise UserError(
                "model.attention: flash_attention_2 is not installed; pip install flash-attn, or "
                "set sdpa"
            )
    # On a GPU Triton compiles a launcher of each kernel, Liger's too (triton/runtime/build.py).
    compilers = [os.environ.get("CC", "gcc"), "clang"] if is_gpu else [os.environ.get("CXX", "g++")]
    has_compiler = any(map(shutil.which, compilers))
    for field, is_set in (("compile", recipe.train.compile), ("liger", recipe.train.liger)):
        if is_set and (is_gpu or field == "compile") and not has_compiler:
            raise UserError(
                f"train.{field}: needs a compiler; apt-get install g++, or set train.{field}=false"
            )
    if recipe.train.liger:
        if not is_gpu:
            raise UserError("train.liger: its kernels need a GPU; set train.liger=false")
        if importlib.util.find_spec("liger_kernel") is None:
            raise UserError(
                "train.liger: not installed; pip install liger-kernel, or set train.liger=false"
            )


def choose_packing(recipe: Recipe, base: PreTrainedModel) -> Packing | None:
    """Return how `recipe` packs the examples that `base` trains on; None if it does not."""
    if not recipe.data.packing:
        return None
    is_flat = read_attention(base.config) == "flash_attention_2"
    return Packing(recipe.data.max_length, is_flat)


def require_packing(engine: Engine, model: nn.Module) -> None:
    """Raise UserError, on every rank, if `model` lets packed examples see one another. Collective."""
    with engine.inference_mode(model):
        leak = measure_packing_leak(model, engine.device)
    leak = all_reduce_max(leak, engine.device)
    if not leak <= MAX_LEAK:  # also for NaN
        raise UserError(
            f"data.packing: an example's loss moves by {leak:.1e} with the one packed before it: "
            "this model's attention does not keep them apart; set data.packing=false"
        )


def refuse_mixed_lengths(recipe: Recipe, inputs: Inputs, measured: Mapping[str, TokenSet]) -> None:
    """Raise UserError if what the base computes of a row would depend on the other rows of its batch.

    Bases with longrope (Phi-3.5, Phi-4-mini) have two sets of rotary frequencies: for rows that are
    no longer than those of their pretraining, and for longer ones. transformers takes one of them for
    a whole batch, by its longest row (modeling_rope_utils.py, longrope_frequency_update).

    Args:
        measured: name -> rows or pieces of text whose loss is measured.
    """
    limit = find_longrope_limit(read_config(inputs.model_path, head=inputs.head))
    if limit is None:
        return
    for setting, off, tokens in _list_batched(recipe, inputs, measured):
        longest = int(tokens.lengths().max())
        if longest > limit:
            raise UserError(
                f"{setting}: the longest of its rows has {longest} tokens, and above {limit} a row of "
                "this base (longrope) changes the rotary frequencies of all rows in its batch; set "
                f"{setting}={off}, or data.max_length={limit}"
            )


def _list_batched(
    recipe: Recipe, inputs: Inputs, measured: Mapping[str, TokenSet]
) -> list[tuple[str, str, TokenSet]]:
    """List what runs several rows in one batch: the setting, its value that does not, the rows."""
    batched = []
    if recipe.train.micro_batch > 1:
        batched.append(("train.micro_batch", "1", inputs.tokens))
    if recipe.data.packing:
        batched.append(("data.packing", "false", inputs.tokens))
    if recipe.calibration.batch_size > 1 and recipe.statistic not in (None, "weight"):
        batched.append(("calibration.batch_size", "1", inputs.calibration.tokens))
    settings = {"held_out": ("data.held_out", "0"), "other_text": ("eval.other_text", "null")}
    for name, tokens in measured.items():
        batched.append((*settings[name], tokens))
    for tokens in inputs.dev.values():
        batched.append(("task.dev", "null", tokens))
    return batched


def find_longrope_limit(config: PretrainedConfig) -> int | None:
    """Return the tokens up to which a base with longrope takes its short frequencies, else None."""
    settings = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    # One mapping, or one for each kind of layer.
    for part in (settings, *settings.values()):
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            return part["original_max_position_embeddings"]
    return None


def apply_kernels(base: PreTrainedModel, recipe: Recipe) -> None:
    """Put the attention that `recipe` names, and Liger's kernels, into `base`. Raises UserError."""
    attention = recipe.model.attention
    if attention != "auto":
        try:
            base.set_attn_implementation(attention)
        except (ValueError, ImportError) as error:
            raise UserError(f"model.attention: {read_first_line(error)}") from None
        if read_attention(base.config) != attention:
            raise UserError(f"model.attention: {type(base).__name__} cannot change it; set auto")
    if not recipe.train.liger:
        return
    try:
        # The loss stays ours, which computes fewer logits.
        apply_liger_kernel(base, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    except (ImportError, TypeError) as error:
        raise UserError(
            f"train.liger: not for this model: {error}; set train.liger=false"
        ) from None


def compile_layers(base: PreTrainedModel) -> list[nn.Module]:
    """Have each decoder layer compiled when it first runs, for rows of any length.

    Returns:
        The layers, for `uncompile_layers`.
    """
    layers = []
    for module in base.modules():
        # FSDP2 makes a subclass of a layer's class, with FSDP before its name.
        if type(module).__name__.removeprefix("FSDP") in list_layer_classes(base):
            module.compile(dynamic=True)
            layers.append(module)
    return layers


def uncompile_layers(layers: list[nn.Module]) -> None:
    """Run `layers` as they were written again."""
    for layer in layers:
        undo_compile(layer)
