"""Count the bytes and the arithmetic of tensor operations while they run on fake tensors."""

import weakref
from typing import Any

from torch import Tensor, nn

from launch.runtime import compat


class CountingMode(compat.DispatchMode):
    """A context that counts the memory and the matrix products of the operations within it.

    PyTorch's own FlopCounterMode would not do: its hooks keep the inputs of modules alive, and it
    does not know attention on CPUs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0  # bytes of the tensors made within the context that still exist
        self.peak = 0  # the largest value of `alive`
        self.flops = 0  # of matrix products and attention
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operation and count it. PyTorch calls this for every operation in the context."""
        given = {compat.identify_storage(tensor) for tensor in compat.find_tensors(args, kwargs)}
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in compat.FLOPS:
            self.flops += compat.FLOPS[func.overloadpacket](*args, **kwargs, out_val=out)
        for tensor in compat.find_tensors(out):
            # A view, or the output of an in-place operation, has the storage of an input.
            if compat.identify_storage(tensor) not in given:
                self._count_storage(tensor)
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


def discard_gradients(model: nn.Module) -> None:
    """Let every gradient of `model` be freed as soon as it is complete."""

    def discard_gradient(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(discard_gradient)
