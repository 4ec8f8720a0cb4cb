"""The one small interface through which the method reaches weights that may be sharded."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


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


class TorchWeights:
    """`Weights` of an ordinary model, held whole on every rank, or of one that FSDP2 (`fully_shard`) has sharded."""

    def read(self, parameter: nn.Parameter) -> Tensor:
        value = parameter.detach()
        if isinstance(value, DTensor):
            whole = value.full_tensor()
            return (
                whole.clone() if value.device_mesh.size() == 1 else whole
            )  # one rank's shard is the parameter itself
        return value.clone()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        value = value.to(parameter.dtype)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(
                value, parameter.device_mesh, parameter.placements, src_data_rank=0
            )
        with torch.no_grad():
            parameter.copy_(value)
