"""What is trained: adapters in the base, or all of its parameters (method full). Where the two differ, it is here."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from astra import adapter
from launch.config.schema import Adapter
from launch.data.inputs import Inputs
from launch.engines import Engine
from launch.runtime.distributed import on_rank0
from launch.training.export import save_adapters, save_model


def attach(
    base: PreTrainedModel, settings: Adapter, ranks: dict[str, int] | None = None
) -> nn.Module:
    """The model that is trained: `base` with PEFT's layers at the targets, or itself.

    Args:
        ranks: of every module, where they are not all alike.
    """
    if settings.method == "full":
        return base
    return adapter.attach(
        base,
        settings.targets,
        settings.rank,
        settings.alpha,
        settings.dropout,
        ranks,
        rslora=settings.method == "rslora",
        dora=settings.method == "dora",
    )


def layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Base-model module name -> PEFT layer; empty where there are none."""
    return adapter.lora_layers(model) if isinstance(model, PeftModel) else {}


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> trained parameter, in the model's order: what checkpoints hold. A tied one has its first name.

    To be called once the engine has sharded the model, since FSDP2 puts other parameters in the places of its own.
    """
    return (
        adapter.parameters(layers(model))
        if isinstance(model, PeftModel)
        else dict(model.named_parameters())
    )


def untrained(model: nn.Module) -> AbstractContextManager[None]:
    """Within it `model`, before it is initialised, is the base."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def export(
    folder: Path,
    model: nn.Module,
    engine: Engine,
    inputs: Inputs,
    initial: Mapping[str, adapter.Factors],
) -> Path:
    """Write what was trained into the run folder, in PEFT's or transformers' format; what of it is to be loaded.

    Collective.
    """
    if not isinstance(model, PeftModel):
        save_model(folder / "model", model, engine, inputs)
        return folder / "model"
    trained = adapter.read_factors(layers(model), engine)
    magnitudes = adapter.read_magnitudes(layers(model), engine)
    config = model.peft_config[adapter.ADAPTER]
    on_rank0(lambda: save_adapters(folder, config, inputs.base, initial, trained, magnitudes))
    return folder / ("adapter" if magnitudes else "lora")
