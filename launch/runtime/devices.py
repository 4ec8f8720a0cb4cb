"""The device of this rank: a GPU of its own, or a share of the machine's CPU threads."""

import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path

import threadpoolctl
import torch
import torch.distributed as dist

from launch.runtime.errors import RankError, UserError, read_first_line

DEVICE_FILES = Path("/dev")  # the NVIDIA driver makes /dev/nvidia0 and so on


def choose_device() -> torch.device:
    """Choose this rank's device; on CPUs, also its share of the machine's threads.

    A launcher may show each rank a single GPU (Slurm's --gpus-per-task=1), which is then number 0
    whatever the local rank. `launch.runtime.distributed.complete_environment` comes first.

    Raises:
        RankError: this rank's GPU fails.
        UserError: there are GPUs, and torch cannot use them.
    """
    if torch.cuda.is_available():
        local_rank = int(os.environ["LOCAL_RANK"])
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        try:
            torch.cuda.set_device(device)
        except RuntimeError as error:  # is_available may ask the driver's library alone
            line = _describe_unusable(f"GPU {device.index}", read_first_line(error))
            raise RankError(line) from None
        _require_kernels(device)
        # Where it can, torch 2.13 takes cuDNN's attention before all others (aten/src/ATen/native/
        # transformers/cuda/sdp_utils.cpp). It builds a plan for every new length of a batch, and with a
        # mask its gradients may be NaN (pytorch#196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
        return device
    _require_no_gpu()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it had to guess
    if "OMP_NUM_THREADS" not in os.environ:
        local_world = int(os.environ["LOCAL_WORLD_SIZE"])
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    # LAPACK, which solves the eigenproblems, counts its threads itself.
    threadpoolctl.threadpool_limits(torch.get_num_threads(), user_api="blas")
    return torch.device("cpu")


def _require_no_gpu() -> None:
    """Raise UserError if this machine has GPUs that torch cannot use and nobody has hidden.

    Training would continue without a word, on CPUs and in fp32, a thousand times slower.
    """
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    if is_hidden or os.environ.get("DS_ACCELERATOR") == "cpu":
        return
    if not any(DEVICE_FILES.glob("nvidia[0-9]*")):
        return
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA; install a build with it"
    else:
        try:
            torch.cuda.init()
            reason = "torch finds none of them"
        except (RuntimeError, AssertionError) as error:
            reason = read_first_line(error)
    raise UserError(_describe_unusable("the NVIDIA GPUs", reason))


def _require_kernels(device: torch.device) -> None:
    """Raise UserError if this build of torch has no kernels for the GPU."""
    built, capability = torch.cuda.get_arch_list(), torch.cuda.get_device_capability(device)
    if not can_run(built, capability):
        reason = (
            f"torch {torch.__version__} is built for {', '.join(built)}, and "
            f"{torch.cuda.get_device_name(device)} is of compute capability "
            f"{'.'.join(map(str, capability))}; install a build for it"
        )
        raise UserError(_describe_unusable(f"GPU {device.index}", reason))


def can_run(built: Sequence[str], capability: tuple[int, int]) -> bool:
    """Return whether a GPU runs what torch is built for.

    Binaries run on later GPUs of the same generation, intermediate code on all later ones. Source:
    NVIDIA, CUDA C++ programming guide, Binary Compatibility and PTX Compatibility.

    Args:
        built: such as sm_80, sm_90a, compute_90, from `torch.cuda.get_arch_list`.
        capability: major and minor number of the GPU's.
    """
    for name in built:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name)
        if match is None:  # of another vendor
            return True
        made = (int(match[2]), int(match[3]))
        if match[4] == "a":  # for this one alone
            if made == capability:
                return True
        elif made <= capability and (match[1] == "compute" or made[0] == capability[0]):
            return True
    return False


def _describe_unusable(gpus: str, reason: str) -> str:
    """Return the line of an error of GPUs that are there."""
    return (
        f"{gpus} of {socket.gethostname()} cannot be used: {reason}; to train on the CPU, set "
        "CUDA_VISIBLE_DEVICES to nothing"
    )


def has_bf16(device: torch.device) -> bool:
    """Return whether a device is a GPU that computes in bfloat16; older ones imitate it, slowly."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def identify_gpu(device: torch.device) -> str:
    """Return what tells a GPU from every other one of any machine; "" for a CPU."""
    if device.type != "cuda":
        return ""
    return f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"


def require_own_gpu(store: dist.Store, rank: int, world_size: int, gpu: str) -> None:
    """Raise UserError, on every rank, if two ranks have one GPU.

    NCCL would refuse them at the first collective, each with a traceback. Every rank calls this,
    before there is a process group.

    Args:
        store: of the process group to be.
        gpu: what `identify_gpu` returned.
    """
    if not gpu:
        return
    store.set(f"gpu/{rank}", gpu)
    names = [f"gpu/{other}" for other in range(world_size)]
    gpus = [value.decode() for value in store.multi_get(names)]
    # Rank 0 may be the store's host: let the others read before it ends.
    store.set(f"gpu/read/{rank}", "1")
    for later, name in enumerate(gpus):
        earlier = gpus.index(name)
        if earlier != later:
            store.wait([f"gpu/read/{other}" for other in range(world_size)])
            host = name.split()[0]
            raise UserError(
                f"ranks {earlier} and {later} have the same GPU of {host}; start at most one rank "
                "for each GPU (deepspeed --num_gpus, torchrun --nproc_per_node, srun "
                "--ntasks-per-node)"
            )
