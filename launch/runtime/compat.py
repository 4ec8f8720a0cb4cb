"""Every touch of a private part of torch, DeepSpeed or transformers: one function each.

A private part may change with any release, without a word. The versions in `TESTED` are those that
the tests were run with; `warn_on_other_versions` tells where others are installed. Each docstring
says why no public part will do, and which upstream report, as of 2026-11, would make the function
unnecessary.
"""

import functools
import importlib.metadata
import os
import socket
from collections.abc import Collection
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PretrainedConfig, PreTrainedModel

from launch.runtime.errors import RankError

if TYPE_CHECKING:
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

TESTED = {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "peft": "0.21.2"}
_GLOO_INIT = dist.ProcessGroupGloo.__init__


# Versions


@functools.cache
def warn_on_other_versions() -> None:
    """Print one line on rank 0 if a package's version is not the tested one; once in a process.

    A build's own suffix, as in 2.13.0+cpu, does not count.
    """
    if dist.get_rank() != 0:
        return
    others = []
    for package, tested in TESTED.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # whoever needs it will say so
        if installed.partition("+")[0] != tested:
            others.append(f"{package} {installed} (tested: {tested})")
    if others:
        print(
            "warning: private parts of these packages are used and may differ: "
            + ", ".join(others),
            flush=True,
        )


# torch.distributed


def run_gloo_in_one_thread(timeout: timedelta) -> None:
    """Run the collectives of every gloo group that is made from now on in one thread.

    torch gives each group two threads. Both write the name of the collective they have finished
    into one string of the group, without a lock (ProcessGroupGloo::runLoop, torch 2.13). A name
    long enough to lie on the heap, as that of DTensor's gathers, is freed twice when two
    collectives finish together. A rank died of that now and then; with 16 gathers at once it did
    within seconds, again and again. torch has no public option for the number of threads.

    No upstream report found (2026-11).

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


def undo_compile(module: nn.Module) -> None:
    """Run `module` as it was written again, after `module.compile()`, which has no opposite.

    No upstream report found (2026-11).
    """
    module._compiled_call_impl = None


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

    torch documents TorchDispatchMode but keeps it in a private module. No upstream report found
    (2026-11).
    """


def make_fake_mode() -> FakeTensorMode:
    """Make a context whose new tensors have shapes and no memory.

    FakeTensorMode is in a private module; pytorch/pytorch#113456 asks for a public one, #173589 and
    #173671 propose it.
    """
    return FakeTensorMode()


def find_tensors(*values: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dictionaries.

    torch's tree functions are private. No upstream report found (2026-11).
    """
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def identify_storage(tensor: Tensor) -> int:
    """Return what tells the storage of `tensor`, which views share, from every other that is alive.

    A fake tensor has no address (`data_ptr`) to tell it by. No upstream report found (2026-11).
    """
    return tensor.untyped_storage()._cdata


def replace_tensors(model: nn.Module) -> None:
    """Put new CPU tensors, without values, in the places of the parameters and buffers of `model`.

    Under a fake mode they take no memory. Tied parameters stay tied. Setting `.data` cannot move a
    meta tensor to another device, and `Module.to_empty` unties. No upstream report found (2026-11).
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


# transformers


def list_layer_classes(model: PreTrainedModel) -> Collection[str]:
    """Return the class names of the model's decoder layers, the units of sharding and compiling.

    transformers has the names for device maps, which must not split such a module.
    huggingface/transformers#24568 asked to shard by them; no report for a public name found
    (2026-11).
    """
    return model._no_split_modules


def read_attention(config: PretrainedConfig) -> str:
    """Return which attention kernels a loaded model uses, such as `sdpa`.

    `set_attn_implementation` is public, but there is no function that reads it. No upstream report
    found (2026-11).
    """
    return config._attn_implementation


# DeepSpeed: the process


def forbid_compiled_collective() -> None:
    """Keep DeepSpeed on CPUs from compiling its shared-memory collective; gloo takes its place.

    Compiling needs a compiler and a minute, and if it is killed, the lock that it leaves hangs the
    next start. Call this before `deepspeed.init_distributed`. No upstream report found (2026-11).
    """
    from deepspeed.ops import __compatible_ops__ as compatible_ops

    compatible_ops["deepspeed_shm_comm"] = False


def switch_off_nvtx() -> None:
    """Switch off DeepSpeed's marks for NVIDIA's profiler, a tenth of a small step's time.

    deepspeedai/DeepSpeed#7912 asks for a domain of their own; no report for a public switch found
    (2026-11).
    """
    from deepspeed.utils import nvtx

    nvtx.enable_nvtx = False


def get_deepspeed_group() -> dist.ProcessGroup:
    """Return the process group that DeepSpeed makes for its own collectives.

    It has torch's default timeout; deepspeedai/DeepSpeed#2927 asks for a way to give another.
    """
    from deepspeed.utils import groups

    return groups._get_data_parallel_group()


def remove_deepspeed_hooks(model: nn.Module) -> None:
    """Remove what a destroyed DeepSpeed engine leaves on the modules of `model`.

    The next engine's backward passes would run the hooks of this one. deepspeedai/DeepSpeed#7204
    asks how an engine is to be deleted and made again.
    """
    for module in model.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt"):
            module.__dict__.pop(name, None)


# DeepSpeed: parameters and optimisers of ZeRO


def is_zero_parameter(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO stage 3 manages `parameter`, so that a rank holds only its shard.

    DeepSpeed documents `ds_id` and the attributes below for debugging only.
    deepspeedai/DeepSpeed#4064, closed as intended, is about sizes of 0; no report for public names
    found (2026-11).
    """
    return hasattr(parameter, "ds_id")


def get_full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return a whole parameter's shape, also where ZeRO stage 3 has made its `shape` `[0]`."""
    return getattr(parameter, "ds_shape", parameter.shape)


def count_elements(parameter: nn.Parameter) -> int:
    """Return a whole parameter's number of elements, also where ZeRO stage 3 has sharded it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def get_shard_size(parameter: nn.Parameter) -> int:
    """Return how many elements of a parameter a rank holds under ZeRO stage 3, with padding."""
    return parameter.ds_tensor.ds_numel


def make_adam_state(zero: "ZeROOptimizer", step: int, moments: Collection[str]) -> bool:
    """Make the state of the AdamW inside DeepSpeed's optimiser, with moments of 0.

    AdamW makes its state in its first step, and DeepSpeed's functions that set it only fill it.
    Since deepspeedai/DeepSpeed#5104 DeepSpeed no longer steps to make it; no report for a public
    function found (2026-11).

    Args:
        zero: DeepSpeed's optimiser, around AdamW.
        step: number of steps that the state stands for.
        moments: keys of AdamW's moments.

    Returns:
        Whether the optimiser is that of stage 3, which shards the parameters too.
    """
    sharded = hasattr(zero, "fp32_partitioned_groups_flat")
    shards = zero.fp32_partitioned_groups_flat if sharded else zero.single_partition_of_fp32_groups
    for shard in shards:
        state = {moment: torch.zeros_like(shard, requires_grad=False) for moment in moments}
        state["step"] = torch.tensor(float(step))
        zero.optimizer.state[shard] = state
    if not sharded:
        zero._lazy_init_hp_params_optimizer_state()
    return sharded
