"""The process group, whoever started it: deepspeed, torchrun, srun or plain python."""

import logging
import os
import socket
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import threadpoolctl
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError

from launch.runtime import watchdog as watch
from launch.runtime.errors import USER_ERRORS, RankError, UserError

T = TypeVar("T")


# Collectives themselves never time out: launch.runtime.watchdog ends a job whose ranks are gone or
# stall, and says which.
FOREVER = timedelta(days=30)
STALL = 600.0  # seconds
_GLOO_INIT = dist.ProcessGroupGloo.__init__


def start(stall: float = STALL) -> torch.device:
    """Start the process group (nccl on GPUs, gloo on CPUs) and the watch over it; return this rank's device.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which launchers set; under srun, Slurm's own
    variables and MASTER_ADDR, MASTER_PORT; without any this is the only rank. On CPUs the cores are shared out among
    the ranks of the machine unless OMP_NUM_THREADS is set.

    Args:
        stall: seconds, after which ranks that have not come, or make no progress, are given up.

    Raises:
        RankError: the ranks did not find each other, or a network that was named.
    """
    warnings.filterwarnings(
        "ignore", category=FutureWarning
    )  # from inside deepspeed and transformers, every call
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if "RANK" not in os.environ:
        os.environ |= _slurm_ranks() if "SLURM_STEP_ID" in os.environ else _only_rank()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
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
        threadpoolctl.threadpool_limits(
            torch.get_num_threads(), user_api="blas"
        )  # LAPACK, in eigenproblems
    dist.ProcessGroupGloo.__init__ = _one_thread
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    watch.start(rank, world_size)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=stall)))
        store = watch.connect(store, stall)
    except dist.DistError as error:
        raise RankError(
            f"rank {rank} did not reach rank 0 at {address}: {_first_line(error)}"
        ) from None
    try:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=FOREVER
        )
        dist.barrier()  # rank 0 holds the store: were it to end at once, the others would not know why
    except dist.DistError as error:
        raise RankError(
            f"rank {rank} of {world_size} found rank 0 at {address} but not every other rank within {stall:.0f} s: "
            f"{_first_line(error)}"
        ) from None
    return device


def _one_thread(
    self: dist.ProcessGroupGloo,
    store: dist.Store,
    rank: int,
    size: int,
    timeout: timedelta = FOREVER,
) -> None:
    """Make a gloo group, an engine's own too, whose collectives run in one thread, one after another.

    torch gives each group two threads, and both write the name of the collective they have finished into one string
    of the group, without a lock (ProcessGroupGloo::runLoop, torch 2.13). A name long enough to lie on the heap, as
    that of DTensor's gathers, is freed twice when two finish together: a rank died of that now and then, and of 16
    gathers at once, again and again, within seconds.

    Raises:
        RankError: this machine has no network of the name in GLOO_SOCKET_IFNAME.
    """
    gloo, networks = dist.ProcessGroupGloo, os.environ.get("GLOO_SOCKET_IFNAME")
    options = gloo._Options()
    options._threads, options._timeout = 1, timeout
    if networks:
        try:
            options._devices = [gloo.create_device(interface=name) for name in networks.split(",")]
        except RuntimeError:
            raise RankError(
                f"rank {rank}: GLOO_SOCKET_IFNAME: {socket.gethostname()} has no network {networks} with an address"
            ) from None
    else:
        options._devices = [gloo.create_default_device()]
    _GLOO_INIT(self, store, rank, size, options)


def _only_rank() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def _slurm_ranks() -> dict[str, str]:
    """One rank a task of `srun`."""
    of = os.environ
    if "MASTER_ADDR" not in of and int(of.get("SLURM_STEP_NUM_NODES", "1")) > 1:
        raise UserError(
            "MASTER_ADDR: set it to the first node's name before srun (see launch/cluster/slurm.sbatch)"
        )
    tasks = {
        "RANK": "SLURM_PROCID",
        "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
        "LOCAL_RANK": "SLURM_LOCALID",
    }
    found = {name: of[variable] for name, variable in tasks.items()}
    of_nodes = []
    for part in of["SLURM_STEP_TASKS_PER_NODE"].split(","):  # "4", "4(x2)" or "4(x2),1"
        count, _, nodes = part.rstrip(")").partition("(x")
        of_nodes += [count] * int(nodes or 1)
    found["LOCAL_WORLD_SIZE"] = of_nodes[int(of["SLURM_NODEID"])]
    port = 20000 + int(of["SLURM_JOB_ID"]) % 20000
    return found | {
        "MASTER_ADDR": of.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": of.get("MASTER_PORT", str(port)),
    }


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]


def stop() -> None:
    """Leave the process group, when all ranks have come this far."""
    dist.barrier()
    watch.quiet()
    dist.destroy_process_group()


def say(text: str) -> None:
    """Print on rank 0, at once."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def on_rank0(function: Callable[[], T]) -> T:
    """`function()` of rank 0, on every rank; a user error there is raised on every rank. Collective."""
    outcome = [_outcome(function) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(outcome, src=0)
    value, error = outcome[0]
    if error is not None:
        raise UserError(error)
    return value


def on_each_node(function: Callable[[], T]) -> list[T]:
    """`function()` of local rank 0 of every node; a user error of any is raised on every rank. Collective.

    Returns:
        On every rank, by rank: what its node's local rank 0 returned.
    """
    rank, world = dist.get_rank(), range(dist.get_world_size())
    places: list = [None for _ in world]
    dist.all_gather_object(places, (socket.gethostname(), int(os.environ["LOCAL_RANK"])))
    # Hosts may share a name (containers); then the nearest below is the one of the same host.
    owners = [
        max((i for i in range(of + 1) if places[i] == (places[of][0], 0)), default=of)
        for of in world
    ]
    outcomes: list = [None for _ in world]
    dist.all_gather_object(outcomes, _outcome(function) if owners[rank] == rank else None)
    for owner in owners:
        if outcomes[owner][1] is not None:
            raise UserError(outcomes[owner][1])
    return [outcomes[owner][0] for owner in owners]


def _outcome(function: Callable[[], T]) -> tuple[T | None, str | None]:
    """What `function` returns, and the text of a user error: also of a disk that is full, or a folder that is gone."""
    try:
        return function(), None
    except USER_ERRORS as error:
        return None, str(error)
    except OSError as error:
        return None, f"{error.filename or 'file'}: {error.strerror or error}"
    except (
        SafetensorError
    ) as error:  # what safetensors makes of an OSError, without the file's name
        return None, f"cannot write or read a file: {error}"


def broadcast_tensor(value: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Rank 0's `value`, on every rank's `device`; the others pass None. Collective."""
    like = [None if value is None else (value.shape, value.dtype)]
    dist.broadcast_object_list(like)
    value = (
        torch.empty(like[0][0], dtype=like[0][1], device=device)
        if value is None
        else value.to(device).contiguous()
    )
    dist.broadcast(value, 0)
    return value


def all_reduce_sum(values: list[float], device: torch.device) -> list[float]:
    """The sum of each of `values` over the ranks, in fp64. Collective."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def all_reduce_max(value: float, device: torch.device) -> float:
    """The largest `value` of any rank. Collective."""
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()
