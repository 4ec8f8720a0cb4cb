"""Read and write whole weights of a model that may be sharded over ranks."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class Weights(Protocol):
    """Access to whole parameters of a model of which each rank may hold only a shard.

    Both methods are collective: all ranks call them for the same parameters in the same order.
    """

    def read(self, parameter: nn.Parameter) -> Tensor:
        """Return a copy of the whole parameter, in its own dtype, on every rank."""
        ...

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the whole parameter to rank 0's `value`, cast to the parameter's dtype."""
        ...


class TorchWeights:
    """Weights of a model that every rank holds whole, or that FSDP2's `fully_shard` has sharded."""

    def read(self, parameter: nn.Parameter) -> Tensor:
        """Return a copy of the whole parameter, in its own dtype, on every rank."""
        value = parameter.detach()
        if not isinstance(value, DTensor):
            return value.clone()
        whole = value.full_tensor()
        # On one rank full_tensor() returns the parameter's own memory.
        return whole.clone() if value.device_mesh.size() == 1 else whole

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the whole parameter to rank 0's `value`, cast to the parameter's dtype."""
        value = value.to(parameter.dtype)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(
                value, parameter.device_mesh, parameter.placements, src_data_rank=0
            )
        with torch.no_grad():
            parameter.copy_(value)
