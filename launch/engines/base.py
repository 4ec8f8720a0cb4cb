"""The small interface behind which DeepSpeed, and whatever else shards a model, stands."""

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from astra.weights import Weights

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
KINDS = (
    "trained",
    "exp_avg",
    "exp_avg_sq",
)  # of a parameter in training: its value, and AdamW's moments of it


def read_config(engine: str) -> dict:
    """DeepSpeed's config of one of its engines: ds_configs/<engine>.json."""
    return json.loads((CONFIGS / f"{engine}.json").read_text())


class Stepper(Protocol):
    """A model in training: gradients summed over micro batches and averaged over ranks, then one optimiser step."""

    model: nn.Module
    """What the training's forward passes must call: the model itself, or the engine's wrapper around it."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of one micro batch's scalar loss; `last`: of those before the step."""
        ...

    def step(self, lr: float) -> Tensor:
        """Average over ranks, clip, update with learning rate `lr`, clear; the gradient norm before clipping, ()."""
        ...

    def state(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor, Tensor]:
        """KINDS of a parameter, whole and fp32, on every rank. Collective; after a step."""
        ...

    def restore(
        self, step: int, states: Iterable[tuple[nn.Parameter, Tensor, Tensor, Tensor]]
    ) -> None:
        """Set parameters and optimiser to what they were after `step` steps: (parameter, *KINDS) of each.

        Collective; before the first step, with the same values on every rank.
        """
        ...


class Engine(Weights, Protocol):
    """How a model is held and stepped. Every function is collective."""

    device: torch.device
    sharded: bool
    """True if ranks hold shards, so that all ranks must run every module the same number of times."""
    reentrant: bool
    """Which of PyTorch's two forms of gradient checkpointing works with this engine."""

    def load(self, path: str, full: bool = False) -> PreTrainedModel:
        """The causal LM at the local folder `path`, on the device; sharded while it is read.

        Args:
            full: all of it is to be trained, not frozen. Forward and backward passes are in the engine's dtype, but
                AdamW steps fp32 weights: bfloat16 has 8 bits, so that updates below 2^-9 of a weight would be lost.
        """
        ...

    def inference(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within it `model` can run forward passes, before it is trained."""
        ...

    def training(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> Stepper:
        """Make `model` trainable. It can run in eval mode too."""
        ...
