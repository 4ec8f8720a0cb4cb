"""The interface behind which DeepSpeed, FSDP2 or plain PyTorch holds and trains a model."""

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from astra.weights import Weights
from launch.models.check import CheckedModel, read_config
from launch.runtime.compat.transformers_parts import choose_auto_class

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's two moments of a parameter
STATE_KINDS = ("trained", *MOMENTS)  # of a parameter in training: its value and its moments


def read_deepspeed_config(engine: str) -> dict:
    """Read the DeepSpeed configuration of one of its engines, ds_configs/<engine>.json."""
    return json.loads((CONFIGS / f"{engine}.json").read_text(encoding="utf-8"))


def load_pretrained(checked: CheckedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Load a checked model by transformers; the values of its new weights are left to the caller."""
    config = read_config(checked.folder, head=checked.head)
    # A causal model's config is read by from_pretrained itself, which completes it.
    options = {} if checked.head is None else {"config": config}
    model = choose_auto_class(config).from_pretrained(
        str(checked.folder), dtype=dtype, local_files_only=True, use_safetensors=True, **options
    )
    model.config.problem_type = config.problem_type
    return model


class TrainState(Protocol):
    """A model in training, with its optimiser.

    Gradients are summed over micro batches and averaged over ranks before each optimiser step.
    """

    model: nn.Module
    """What the training's forward passes must call: the model, or the engine's wrapper around it."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of one micro batch's scalar loss.

        Args:
            loss: scalar.
            last: whether this is the step's last micro batch.
        """
        ...

    def step(self, lr: float) -> Tensor:
        """Average gradients over ranks, clip them, update and clear them.

        Args:
            lr: learning rate; that of a group of the optimiser is its `lr_factor` times as large.

        Returns:
            The global gradient norm before clipping, a scalar tensor.
        """
        ...

    def read_state(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor, Tensor]:
        """Return STATE_KINDS of a parameter, whole and in fp32, on every rank.

        Collective; to be called after a step.
        """
        ...

    def restore_state(
        self, step: int, states: Iterable[tuple[nn.Parameter, Tensor, Tensor, Tensor]]
    ) -> None:
        """Set parameters and optimiser to what they were after `step` steps.

        Collective; to be called before the first step, with the same values on every rank.

        Args:
            states: (parameter, *STATE_KINDS) of every trained parameter, each whole and in fp32.
        """
        ...


class Engine(Weights, Protocol):
    """How a model is held and trained. Every method is collective.

    The order of calls: `load_model`, adapters attached, `materialize`, then any number of
    `inference_mode` contexts, then `make_trainable`.
    """

    device: torch.device
    sharded: bool
    """Whether ranks hold shards, so that all ranks must run every module equally often."""
    reentrant: bool
    """Which of PyTorch's two forms of gradient checkpointing works with this engine."""

    def load_model(self, checked: CheckedModel, full: bool = False) -> PreTrainedModel:
        """Load the model that `check_model` has checked.

        Args:
            full: whether all parameters are to be trained. Forward and backward passes are in the
                engine's dtype, but AdamW steps fp32 weights: bfloat16 has 8 significant bits, so
                updates below 2^-9 of a weight would be lost.

        Returns:
            The model, frozen unless `full`. Its weights may not have values yet (FSDP2), so
            adapters can be attached before it is sharded: see `materialize`. Values of
            `checked.new_weights` are left to the caller.
        """
        ...

    def materialize(self, model: nn.Module) -> None:
        """Give the weights of a loaded `model`, adapters attached, their (sharded) values.

        Does nothing where `load_model` did so already, or at a second call.
        """
        ...

    def inference_mode(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which the materialized `model` runs forward passes, untrained yet."""
        ...

    def make_trainable(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> TrainState:
        """Put `model` and its optimiser in the engine's hands. The model can run in eval mode too.

        Args:
            optimizer: AdamW, whose groups have an `lr_factor` (see TrainState.step).
        """
        ...
