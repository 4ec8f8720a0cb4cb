"""The one small interface through which the method reaches weights that may be sharded."""

from typing import Protocol

import torch
from torch import Tensor, nn


class Weights(Protocol):
    """Whole parameters of a model whose ranks may each hold only a shard.

    Both functions are collective: every rank calls them, for the same parameters in the same order.
    """

    def read(self, parameter: nn.Parameter) -> Tensor:
        """A copy of the whole parameter, in its own dtype, on every rank."""
        ...

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the whole parameter to rank 0's `value`, cast to the parameter's dtype."""
        ...


class PlainWeights:
    """`Weights` of an ordinary model, held whole on every rank."""

    def read(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().clone()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(value)
