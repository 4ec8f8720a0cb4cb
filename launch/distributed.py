"""The process group, whoever started it: deepspeed, torchrun, srun or plain python."""

import logging
import os
import socket
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
import transformers

from launch.errors import USER_ERRORS, UserError

T = TypeVar("T")


def start() -> torch.device:
    """Start the process group (nccl on GPUs, gloo on CPUs) and return this rank's device.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without them this is the only rank. On CPUs the
    cores are shared out among the ranks of the machine unless OMP_NUM_THREADS is set.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # from inside deepspeed and transformers, every call
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = port
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it had to guess
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    # Rank 0 reads and tokenises the data while the others wait in a collective: longer than the default ten minutes.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return device


def stop() -> None:
    """Leave the process group."""
    dist.destroy_process_group()


def say(text: str) -> None:
    """Print on rank 0, at once."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def on_rank0(function: Callable[[], T]) -> T:
    """`function()` of rank 0, on every rank; a user error there is raised on every rank. Collective."""
    outcome: list = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except USER_ERRORS as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def all_reduce_sum(value: float, device: torch.device) -> float:
    """The sum of `value` over the ranks, in fp64. Collective."""
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def all_reduce_max(value: float, device: torch.device) -> float:
    """The largest `value` of any rank. Collective."""
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()
