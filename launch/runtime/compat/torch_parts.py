"""Private parts of torch: process groups, compiled modules, and tensors without values."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from launch.runtime.errors import RankError

_GLOO_INIT = dist.ProcessGroupGloo.__init__


# torch.distributed


def run_gloo_in_one_thread(timeout: timedelta) -> None:
    """Run the collectives of every gloo group that is made from now on in one thread.

    torch gives each group two threads. Both write the name of the collective they have finished
    into one string of the group, without a lock (ProcessGroupGloo::runLoop, torch 2.13). A name
    long enough to lie on the heap, as that of DTensor's gathers, is freed twice when two
    collectives finish together. A rank died of that now and then; with 16 gathers at once it did
    within seconds, again and again. torch has no public option for the number of threads.

    Args:
        timeout: of the collectives of groups that are made without one.
    """

    def init_group(
        self: dist.ProcessGroupGloo,
        store: dist.Store,
        rank: int,
        size: int,
        timeout: timedelta = timeout,
    ) -> None:
        _GLOO_INIT(self, store, rank, size, _make_gloo_options(rank, timeout))

    dist.ProcessGroupGloo.__init__ = init_group


def _make_gloo_options(rank: int, timeout: timedelta) -> Any:
    """Make the options of a gloo group with one thread.

    Raises:
        RankError: this machine has no network of a name in GLOO_SOCKET_IFNAME.
    """
    gloo, networks = dist.ProcessGroupGloo, os.environ.get("GLOO_SOCKET_IFNAME")
    options = gloo._Options()
    options._threads, options._timeout = 1, timeout
    if not networks:
        options._devices = [gloo.create_default_device()]
        return options
    try:
        options._devices = [gloo.create_device(interface=name) for name in networks.split(",")]
    except RuntimeError:
        raise RankError(
            f"rank {rank}: GLOO_SOCKET_IFNAME: {socket.gethostname()} has no network {networks} "
            "with an address"
        ) from None
    return options


def set_group_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Set the timeout of a process group that a library has made with torch's default.

    torch 2.13 has no public function for it; pytorch/pytorch#187387 adds
    torch.distributed.set_timeout.
    """
    _set_pg_timeout(timeout, group)


# torch.nn and torch.compile


def compute_norms(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Compute the 2-norm of each tensor, scalars, in one kernel for many of them on a GPU.

    `torch.nn.utils.get_total_norm` calls the same function, but returns one norm of all.
    """
    return torch._foreach_norm(tensors, 2.0)


def undo_compile(module: nn.Module) -> None:
    """Run `module` as it was written again, after `module.compile()`, which has no opposite."""
    module._compiled_call_impl = None


@contextmanager
def run_uncompiled(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context, run `modules` as they were written; after it, what was compiled before.

    torch.compiler.set_stance is public, but holds for all that the process compiles.
    """
    compiled = [module._compiled_call_impl for module in modules]
    for module in modules:
        undo_compile(module)
    try:
        yield
    finally:
        for module, call in zip(modules, compiled, strict=True):
            module._compiled_call_impl = call


# torch's fake tensors and dispatch, for launch.planning

# Attention on CPUs is not among the operations whose arithmetic torch 2.13 counts:
# pytorch/pytorch#195460, mended in pytorch/pytorch#195801.
_ATEN = torch.ops.aten
FLOPS = flop_registry | {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _ATEN._scaled_dot_product_flash_attention
    ],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}
"""ATen operation -> function of its arguments that returns its floating-point operations."""


class DispatchMode(TorchDispatchMode):
    """A context that sees every operation on tensors, in its `__torch_dispatch__`.

    torch documents TorchDispatchMode but keeps it in a private module.
    """


def make_fake_mode() -> FakeTensorMode:
    """Make a context whose new tensors have shapes and no memory.

    FakeTensorMode is in a private module; pytorch/pytorch#113456 asks for a public one, #173589 and
    #173671 propose it.
    """
    return FakeTensorMode()


def find_tensors(*values: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dictionaries.

    torch's tree functions are private.
    """
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def identify_storage(tensor: Tensor) -> int:
    """Return an id of the tensor's storage: views share it, and no other live storage has it.

    A fake tensor has no address (`data_ptr`) to tell it by.
    """
    return tensor.untyped_storage()._cdata


def changes_its_inputs(operation: Any) -> bool:
    """Return whether an ATen operation writes into an input. Its schema is private to torch."""
    return operation._schema.is_mutable


def replace_tensors(model: nn.Module) -> None:
    """Put new CPU tensors, without values, in the places of the parameters and buffers of `model`.

    Under a fake mode they take no memory. Tied parameters stay tied. Setting `.data` cannot move a
    meta tensor to another device, and `Module.to_empty` unties.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in made:
                empty = torch.empty(old.shape, dtype=old.dtype)
                made[id(old)] = nn.Parameter(empty, old.requires_grad)
            module._parameters[name] = made[id(old)]
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype)
