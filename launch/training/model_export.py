"""Write a whole model in transformers' format: its weights, config, tokenizer and chat templates.

Weights have the names that the base's files have: transformers fuses experts, for example, while it
reads a mixture of experts, and each expert is to be a tensor of its own again.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from astra.adapter import ADAPTER_CONFIG
from launch.data.inputs import Inputs
from launch.engines import Engine
from launch.models.check import read_config
from launch.models.files import FILES
from launch.models.head import Head
from launch.models.weight_files import find_weight_files, naming_model
from launch.run.provenance import name_dtype
from launch.runtime.compat.deepspeed_parts import get_full_shape
from launch.runtime.compat.transformers_parts import (
    list_kept_in_fp32,
    make_meta_model,
    report_loading,
)
from launch.runtime.distributed import run_on_rank0
from launch.runtime.files import write_json
from launch.training.shards import write_shards

Description = dict[str, Tensor]  # name -> meta tensor of the weight's shape and dtype


def save_model(
    folder: Path,
    model: PreTrainedModel,
    engine: Engine,
    inputs: Inputs,
    rehearsal: bool = False,
) -> None:
    """Write the whole trained model, in the recipe's dtype (see `describe_weights`). Collective.

    Args:
        rehearsal: see `write_weights`.
    """
    read = partial(read_weight, model, engine)
    write_weights(folder, model, describe_weights(model, inputs.dtype), read, rehearsal)
    run_on_rank0(lambda: write_config(inputs.model_path, folder, inputs.dtype, inputs.head))


def describe_weights(model: PreTrainedModel, dtype: torch.dtype) -> Description:
    """Describe what a model's files hold: its parameters in `dtype`, and its persistent buffers.

    What transformers keeps in fp32, whatever the dtype that it loads, is in fp32. A tied weight is
    there under its first name only.
    """
    weights, in_fp32 = {}, list_kept_in_fp32(model, dtype)
    for name, parameter in model.named_parameters():
        shape = get_full_shape(parameter)
        own = torch.float32 if name in in_fp32 else dtype
        weights[name] = torch.empty(shape, dtype=own, device="meta")
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in persistent:
            weights[name] = torch.empty_like(buffer, device="meta")
    return weights


def read_weight(model: PreTrainedModel, engine: Engine, name: str) -> Tensor:
    """Return a whole parameter, or a buffer. Collective."""
    owner, _, attribute = name.rpartition(".")
    value = getattr(model.get_submodule(owner), attribute)
    return engine.read(value) if isinstance(value, torch.nn.Parameter) else value


def write_weights(
    folder: Path,
    model: PreTrainedModel,
    weights: Description,
    read: Callable[[str], Tensor],
    rehearsal: bool,
) -> None:
    """Write weights to `folder` as safetensors files, under the names of the base's. Collective.

    They are gathered layer by layer into rank 0's CPU memory, and written file by file.

    Args:
        model: whose conversions are reverted.
        weights: of all weights, by their names in `model`.
        read: returns the whole weight of a name. Collective.
        rehearsal: only try it: the smallest layer is read and written, and of the others the names
            that they are converted to.

    Raises:
        UserError: on every rank, if a file cannot be written.
    """
    # The conversions that transformers keeps with a loaded model differ from engine to engine: under
    # ZeRO-3 those that it did not use are among them, and FSDP changes the classes they go by.
    model = make_meta_model(model.config)

    def convert(layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        converted = revert_weight_conversion(model, dict(layer))
        return {
            name: torch.empty(0, dtype=value.dtype) if value.is_meta else value
            for name, value in converted.items()
        }

    def read_layers() -> Iterator[Mapping[str, Tensor]]:
        layers = run_on_rank0(lambda: plan_layers(model, weights))
        smallest = min(layers, key=lambda names: sum(weights[name].numel() for name in names))
        for names in layers:
            if rehearsal and names != smallest:
                yield {name: weights[name] for name in names}
                continue
            layer = {}
            for name in names:
                value = read(name)
                if dist.get_rank() == 0:
                    # A copy of the very shape: FSDP2's storage may be padded.
                    layer[name] = torch.empty_like(weights[name], device="cpu").copy_(value)
            yield layer

    write_shards(folder, read_layers(), convert)


def plan_layers(model: PreTrainedModel, weights: Description) -> list[list[str]]:
    """Group the names of weights into parts that can be converted one by one.

    Returns:
        The names of each layer; or all names together, if a conversion joins several layers.

    Raises:
        ValueError: transformers would not read the converted weights again.
    """
    layers = _group_by_layer(weights)
    converted: Description = {}
    for names in layers:
        converted |= revert_weight_conversion(model, {name: weights[name] for name in names})
    together = revert_weight_conversion(model, dict(weights))
    _check_reading(model, together)
    shapes, own_shapes = (
        {name: value.shape for name, value in found.items()} for found in (together, converted)
    )
    return layers if own_shapes == shapes else [list(weights)]


def _check_reading(model: PreTrainedModel, converted: Description) -> None:
    """Raise ValueError if transformers would not read weights of these names and shapes again."""
    empty = make_meta_model(model.config)  # loading leaves its conversions with a model
    forms = {name: (value.dtype, tuple(value.shape)) for name, value in converted.items()}
    report = report_loading(empty, forms)
    lost = [*report.failed, *report.missing, *report.unexpected, *report.mismatched]
    if lost:
        raise ValueError(
            f"transformers would not read {lost[0]} of a {type(empty).__name__} again, nor "
            f"{len(lost) - 1} more weights"
        )


def _group_by_layer(names: Iterable[str]) -> list[list[str]]:
    """Group names by what stands before and with their first number."""
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = re.match(r"(.*?\.\d+\.)?", name)[0]
        groups.setdefault(layer, []).append(name)
    return list(groups.values())


def write_config(base: Path, folder: Path, dtype: torch.dtype, head: Head | None = None) -> None:
    """Copy all files of the base's folder but its weights, and name the dtype. Rank 0 calls it.

    A new head is named too.

    Raises:
        UserError: transformers would not find the weights that lie in `folder`.
    """
    for pattern in (*FILES, "additional_chat_templates/*.jinja"):
        for path in base.glob(pattern):
            is_weights = ".safetensors" in path.name or path.name.endswith(".index.json")
            # With ADAPTER_CONFIG in a model's folder transformers looks for an adapter there.
            if is_weights or path.name == ADAPTER_CONFIG or not path.is_file():
                continue
            target = folder / path.relative_to(base)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # older files' name of dtype
    config.pop("transformers_weights", None)  # the name of the base's own file of weights
    config.pop("auto_map", None)  # names of the base's own code, which is not copied
    if head is not None:
        config |= _describe_head(base, head)
    write_json(folder / "config.json", config | {"dtype": name_dtype(dtype)})
    with naming_model("export"):
        find_weight_files(folder, read_config(folder, "export", head))


def _describe_head(base: Path, head: Head) -> dict:
    """Return the fields of config.json by which transformers makes a base with its new head."""
    config = read_config(base, head=head)
    fields = {"architectures": [type(make_meta_model(config)).__name__]}
    fields["id2label"] = {str(i): label for i, label in config.id2label.items()}
    fields["label2id"] = config.label2id
    fields["problem_type"] = config.problem_type
    fields["pad_token_id"] = config.pad_token_id
    return fields
