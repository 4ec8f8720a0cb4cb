"""What is trained: adapters in the base, or all of its parameters (method full). Where the two differ, it is here."""

from contextlib import AbstractContextManager, nullcontext

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from astra import adapter
from launch.recipe import Adapter


def attach(base: PreTrainedModel, settings: Adapter, ranks: dict[str, int] | None = None) -> nn.Module:
    """The model that is trained: `base` with PEFT's layers at the targets. `ranks` are each module's, if not alike."""
    return adapter.attach(base, settings.targets, settings.rank, settings.alpha, settings.dropout, ranks)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> trained parameter, in the model's order: what checkpoints hold.

    To be called once the engine has sharded the model, since FSDP2 puts other parameters in the places of its own.
    """
    return adapter.parameters(adapter.lora_layers(model))


def untrained(model: nn.Module) -> AbstractContextManager[None]:
    """Within it `model`, before it is initialised, is the base."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
