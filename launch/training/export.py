"""What a run exports: adapter/, astra_init/ and lora/, or model/.

astra_init/ holds A0 and B0 of any method that starts on a residual base, PiSSA for example.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from astra.adapter import Factors, save_adapter, to_plain_lora
from launch.data.inputs import Inputs
from launch.engines import Engine
from launch.run.provenance import dtype_name
from launch.runtime.distributed import run_on_rank0
from launch.runtime.files import write_json
from launch.runtime.model_files import FILES

RESIDUAL_WARNING = (
    "This adapter is valid only on the residual base W_res, which is rebuilt from the original "
    "base and ../astra_init. On the original base use ../lora instead."
)


def save_adapters(
    folder: Path,
    config: LoraConfig,
    base: dict,
    initial: Mapping[str, Factors],
    trained: Mapping[str, Factors],
    magnitudes: Mapping[str, Tensor],
) -> None:
    """Write the trained adapter in PEFT's format. Rank 0 calls it.

    adapter/ holds the trained factors. On a residual base, astra_init/ holds A0 and B0, and lora/
    the difference, valid on the original base. Otherwise lora/ is the trained adapter itself; DoRA
    has none, because no plain LoRA equals it.

    Args:
        base: name and weights_sha256 of the base model. They are kept beside each adapter, and
            checked when it is loaded.
        initial, trained: factors by module name.
        magnitudes: DoRA's by module name; empty for the others.
    """
    # By value: a method that starts on a residual may have found nothing but zeros.
    on_residual = any(factors.b.any() and factors.a.any() for factors in initial.values())
    exports: dict[str, Mapping[str, Factors]] = {"adapter": trained}
    if on_residual:
        exports["astra_init"] = initial
        exports["lora"] = to_plain_lora(trained, initial)
    elif not magnitudes:
        exports["lora"] = trained
    for name, factors in exports.items():
        save_adapter(folder / name, config, base["name"], factors, magnitudes)
        needs_residual = on_residual and name == "adapter"
        valid_on = {"on": "residual" if needs_residual else "original"}
        write_json(folder / name / "base.json", base | valid_on)
    if on_residual:
        (folder / "adapter" / "README.md").write_text(RESIDUAL_WARNING + "\n", encoding="utf-8")


def save_model(folder: Path, model: PreTrainedModel, engine: Engine, inputs: Inputs) -> None:
    """Write the whole trained model in transformers' format, with the base's tokenizer. Collective.

    Weights are in the recipe's dtype, gathered one after another into rank 0's CPU memory.
    """
    tensors = {}
    for name, parameter in model.named_parameters():  # a tied one once
        value = engine.read(parameter)
        if dist.get_rank() == 0:
            # A copy of the very shape: FSDP2's storage may be padded.
            tensors[name] = torch.empty(value.shape, dtype=inputs.dtype).copy_(value)
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in persistent:
            tensors[name] = buffer.cpu()

    def write() -> None:
        folder.mkdir(exist_ok=True)
        save_torch_state_dict(revert_weight_conversion(model, tensors), folder)
        _copy_other_files(inputs.model_path, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)  # older files' name of dtype
        write_json(folder / "config.json", config | {"dtype": dtype_name(inputs.dtype)})

    run_on_rank0(write)


def _copy_other_files(source: Path, folder: Path) -> None:
    """Copy a model's files but its weights."""
    for pattern in FILES:
        for path in source.glob(pattern):
            if ".safetensors" not in path.name:
                shutil.copyfile(path, folder / path.name)


def read_adapter_base(folder: Path) -> dict | None:
    """Read what `save_adapters` noted of an adapter's base; None for an adapter made elsewhere."""
    path = folder / "base.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_plain_rank(run: Path) -> int | None:
    """Read the rank of the run's lora/, the largest of its modules'; None where it has none."""
    path = run / "lora" / "adapter_config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    return max([config["r"], *config["rank_pattern"].values()])
