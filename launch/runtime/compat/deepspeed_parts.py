"""Private parts of DeepSpeed: its process-wide settings, and the parameters and optimisers of ZeRO."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

if TYPE_CHECKING:
    from deepspeed.runtime.base_optimizer import ZeROOptimizer


# The process


def forbid_compiled_collective() -> None:
    """Keep DeepSpeed on CPUs from compiling its shared-memory collective; gloo takes its place.

    Compiling needs a compiler and a minute, and if it is killed, the lock that it leaves hangs the
    next start. Call this before `deepspeed.init_distributed`.
    """
    from deepspeed.ops import __compatible_ops__ as compatible_ops

    compatible_ops["deepspeed_shm_comm"] = False


def switch_off_nvtx() -> None:
    """Switch off DeepSpeed's marks for NVIDIA's profiler, a tenth of a small step's time.

    deepspeedai/DeepSpeed#7912 asks for a domain of their own; no report for a public switch found.
    """
    from deepspeed.utils import nvtx

    nvtx.enable_nvtx = False


@contextmanager
def deepspeed_device(device: torch.device) -> Iterator[None]:
    """Within the context, let DeepSpeed put weights and engines on `device`, a GPU or the CPU.

    DeepSpeed takes LOCAL_RANK for the GPU's number, also where a launcher shows each rank one GPU,
    number 0, only: deepspeedai/DeepSpeed#3165.
    """
    before = os.environ.get("LOCAL_RANK")
    if device.index is not None:
        os.environ["LOCAL_RANK"] = str(device.index)
    try:
        yield
    finally:
        if before is not None:
            os.environ["LOCAL_RANK"] = before


def get_deepspeed_group() -> dist.ProcessGroup:
    """Return the process group that DeepSpeed makes for its own collectives.

    It has torch's default timeout; deepspeedai/DeepSpeed#2927 asks for a way to give another.
    """
    from deepspeed.utils import groups

    return groups._get_data_parallel_group()


def get_node_group() -> dist.ProcessGroup | None:
    """Return the process group of this node's ranks that DeepSpeed has made for hpZ, if any.

    See `get_deepspeed_group`.
    """
    from deepspeed.utils import groups

    return groups._get_zero_param_intra_parallel_group()


def forget_node_group() -> None:
    """Let DeepSpeed make hpZ's group anew, or none, for the next model that is loaded.

    It keeps the first one for ever: a second `zero.Init` with hpZ fails, as the group is there
    (deepspeedai/DeepSpeed#4901; #8361 is to mend it), and an engine without hpZ would use it.
    """
    from deepspeed.utils import groups

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def remove_deepspeed_hooks(model: nn.Module) -> None:
    """Remove what a destroyed DeepSpeed engine leaves on the modules of `model`, and of `model`.

    The next engine's backward passes would run the hooks of this one, and stage 3's list of modules
    that run would keep `model` in memory for ever. deepspeedai/DeepSpeed#7204 asks how an engine is
    to be deleted and made again.
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK as RUNNING

    RUNNING[:] = [module for module in RUNNING if module is not model]
    for module in model.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt"):
            module.__dict__.pop(name, None)


# Parameters and optimisers of ZeRO


def is_zero_parameter(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO stage 3 manages `parameter`, so that a rank holds only its shard.

    DeepSpeed documents `ds_id` and the attributes below for debugging only.
    deepspeedai/DeepSpeed#4064, closed as intended, is about sizes of 0; no report for public names
    found.
    """
    return hasattr(parameter, "ds_id")


def get_full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return a whole parameter's shape, also where ZeRO stage 3 has made its `shape` `[0]`.

    See `is_zero_parameter`.
    """
    return getattr(parameter, "ds_shape", parameter.shape)


def count_elements(parameter: nn.Parameter) -> int:
    """Return a whole parameter's number of elements, also where ZeRO stage 3 has sharded it.

    See `is_zero_parameter`.
    """
    return getattr(parameter, "ds_numel", parameter.numel())


def get_shard_size(parameter: nn.Parameter) -> int:
    """Return how many elements of a parameter a rank holds under ZeRO stage 3, with padding.

    See `is_zero_parameter`.
    """
    return parameter.ds_tensor.ds_numel


def make_adam_state(zero: "ZeROOptimizer", step: int, moments: Collection[str]) -> bool:
    """Make the state of the AdamW inside DeepSpeed's optimiser, with moments of 0.

    AdamW makes its state in its first step, and DeepSpeed's functions that set it only fill it.
    Since deepspeedai/DeepSpeed#5104 DeepSpeed no longer steps to make it; no report for a public
    function found.

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
        # A fused AdamW counts its steps on the device.
        state["step"] = torch.tensor(float(step), device=shard.device)
        zero.optimizer.state[shard] = state
    if not sharded:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    return sharded
