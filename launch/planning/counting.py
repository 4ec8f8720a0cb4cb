"""Count the bytes and the arithmetic of tensor operations while they run on fake tensors."""

import weakref
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from launch.runtime.compat.torch_parts import (
    FLOPS,
    DispatchMode,
    changes_its_inputs,
    find_tensors,
    identify_storage,
)

# They name memory, and do not touch it.
_UNTOUCHED = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class Operation(NamedTuple):
    """What one operation does to the device that runs it."""

    flops: int  # of matrix products and attention; 0 for everything else
    traffic: int  # bytes of the tensors that it reads and writes, each once
    is_bf16: bool  # whether its products are of bf16


class CountingMode(DispatchMode):
    """A context that counts the memory and the matrix products of the operations within it.

    PyTorch's own FlopCounterMode would not do: its hooks keep the inputs of modules alive, and it
    does not know attention on CPUs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0  # bytes of the tensors made within the context that still exist
        self.peak = 0  # the largest value of `alive`
        self.operations: Counter[Operation] = Counter()  # -> how many of them ran
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operation and count it. PyTorch calls this for every operation in the context."""
        inputs = find_tensors(args, kwargs)
        given = {identify_storage(tensor) for tensor in inputs}
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outputs = find_tensors(out)
        # A view, or the output of an in-place operation, has the storage of an input.
        made = [tensor for tensor in outputs if identify_storage(tensor) not in given]
        for tensor in made:
            self._count_storage(tensor)
        moves = bool(made) or changes_its_inputs(func)
        if moves and func.overloadpacket.__name__ not in _UNTOUCHED:
            flops = 0
            if func.overloadpacket in FLOPS:
                flops = FLOPS[func.overloadpacket](*args, **kwargs, out_val=out)
            traffic = sum(map(_count_touched, (*inputs, *outputs)))
            is_bf16 = any(tensor.dtype == torch.bfloat16 for tensor in outputs)
            self.operations[Operation(flops, traffic, is_bf16)] += 1
        return out

    def _count_storage(self, tensor: Tensor) -> None:
        """Count the storage of a new tensor, once, until it is freed."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._subtract_bytes, storage.nbytes())

    def _subtract_bytes(self, size: int) -> None:
        """Count a storage that has been freed."""
        self.alive -= size


def _count_touched(tensor: Tensor) -> int:
    """Return the bytes of memory behind a tensor: an expanded one repeats few of them."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def discard_gradients(model: nn.Module) -> None:
    """Let every gradient of `model` be freed as soon as it is complete."""

    def discard_gradient(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(discard_gradient)
