"""The process group of ranks that deepspeed, torchrun, srun or plain python has started.

`run_on_rank0` and `run_on_each_node` raise a user error of one rank on all of them. One that a rank
meets outside of them reaches the others through the watchdog (launch.runtime.entry).

"Collective" in a docstring means that every rank must call the function, in the same order.
"""

import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from tqdm import tqdm

from launch.runtime import watchdog
from launch.runtime.compat.torch_parts import run_gloo_in_one_thread
from launch.runtime.compat.versions import warn_on_other_versions
from launch.runtime.devices import choose_device, identify_gpu, require_own_gpu
from launch.runtime.errors import (
    USER_ERRORS,
    RankError,
    RankZeroError,
    UserError,
    describe_error,
    read_first_line,
)
from launch.runtime.shortages import describe_shortage, is_full_disk

T = TypeVar("T")


# Timeout of collectives. They never time out in practice: the watchdog ends a run whose ranks are
# gone or stall, and names them.
FOREVER = timedelta(days=30)
STALL = 600.0  # seconds
# Where MPI's launchers say how many processes they have started: Open MPI; MPICH and Intel; MVAPICH.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def start_process_group(stall: float = STALL) -> torch.device:
    """Start the process group (nccl on GPUs, gloo on CPUs) and the watchdog over it.

    Reads the variables that `complete_environment` completes. On CPUs the ranks of a machine divide
    its cores, unless OMP_NUM_THREADS is set.

    Args:
        stall: seconds after which ranks that have not come, or make no progress, are given up.

    Returns:
        This rank's device.

    Raises:
        RankError: this rank's GPU fails, or the ranks did not find one another, or a network in
            GLOO_SOCKET_IFNAME.
        UserError: this machine's GPUs cannot be used, or two ranks have the same one; and what
            `complete_environment` raises.
    """
    _silence_libraries()
    complete_environment()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = choose_device()
    run_gloo_in_one_thread(FOREVER)
    _join_ranks(rank, world_size, device, stall)
    warn_on_other_versions()
    return device


def _silence_libraries() -> None:
    """Turn off warnings and progress bars of libraries that would repeat on every rank."""
    # From inside deepspeed and transformers, at every call.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _join_ranks(rank: int, world_size: int, device: torch.device, stall: float) -> None:
    """Find the other ranks, start the watchdog, and make the default process group.

    Ranks that find one another in the store may wait for ever in the first collective, for which NCCL
    chooses a network of its own: so that is a phase with a stall limit.

    Raises:
        RankError: a rank did not come within `stall` seconds.
        UserError: two ranks have the same GPU.
    """
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    own_watchdog = watchdog.start_watchdog(rank, world_size)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=stall)))
        store = watchdog.join_peers(own_watchdog, store, stall)
    except dist.DistError as error:
        raise RankError(
            f"rank {rank} did not reach rank 0 at {address}: {read_first_line(error)}"
        ) from None
    watchdog.set_phase("connecting the ranks over the network", timed=True)
    try:
        require_own_gpu(store, rank, world_size, identify_gpu(device))
        dist.init_process_group(
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=FOREVER,
            **_choose_backend(device),
        )
        # Rank 0 holds the store: were it to end at once, the others would not know why.
        dist.barrier()
    except dist.DistBackendError as error:  # NCCL has the cause on its last lines
        cause = " ".join(str(error).split())[-600:]
        raise RankError(f"rank {rank} of {world_size}: NCCL could not start: {cause}") from None
    except dist.DistError as error:
        raise RankError(
            f"rank {rank} of {world_size} found rank 0 at {address} but not every other rank "
            f"within {stall:.0f} s: {read_first_line(error)}"
        ) from None
    watchdog.set_phase("starting")


def _choose_backend(device: torch.device) -> dict[str, Any]:
    """Return the backend of a rank's collectives, as arguments of `init_process_group`."""
    if device.type != "cuda":
        return {"backend": "gloo"}
    # By default torch's own watchdog of NCCL ends this process as soon as another rank is gone,
    # before ours has said which (docs.pytorch.org, ProcessGroupNCCL Environment Variables). The
    # other thread ends it when a CUDA call hangs, which ours does after --stall seconds.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    # Without device_id the first collective guesses the GPU from the global rank, which is another
    # one where a node's ranks are not consecutive (Slurm's cyclic placement).
    return {"backend": "nccl", "device_id": device}


def complete_environment() -> None:
    """Set those of the launcher's variables that this process lacks.

    Launchers set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; under srun they follow from Slurm's
    own. Without any of them this is the only rank. A launcher of one process on each machine need
    not set LOCAL_RANK. deepspeed sets LOCAL_SIZE, not LOCAL_WORLD_SIZE.

    Raises:
        UserError: mpirun has started this process, and what `read_slurm_ranks` raises.
    """
    if "RANK" not in os.environ:
        ranks = read_slurm_ranks() if "SLURM_STEP_ID" in os.environ else _make_only_rank()
        _refuse_mpi(int(ranks["WORLD_SIZE"]))
        os.environ |= ranks
    os.environ.setdefault("LOCAL_RANK", "0")
    local_world_size = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE", "1")
    os.environ["LOCAL_WORLD_SIZE"] = local_world_size


def _refuse_mpi(world_size: int) -> None:
    """Raise UserError if mpirun has started more processes than there would be ranks.

    srun sets such a variable too (--mpi=pmi2): the number of its tasks.
    """
    for name in MPI_SIZES:
        size = int(os.environ.get(name, "1"))
        if size > world_size:
            raise UserError(
                f"{name}: mpirun has started {size} processes, which would not find one another; start "
                "them with torchrun, srun, or deepspeed without --launcher"
            )


def _make_only_rank() -> dict[str, str]:
    """Return the launcher's variables for a process that no launcher started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def read_slurm_ranks() -> dict[str, str]:
    """Read the launcher's variables under `srun`, where every task is a rank.

    Raises:
        UserError: there are several nodes, and MASTER_ADDR is not set.
    """
    environment = os.environ
    if "MASTER_ADDR" not in environment and int(environment.get("SLURM_STEP_NUM_NODES", "1")) > 1:
        raise UserError(
            "MASTER_ADDR: set it to the first node's name before srun "
            "(see launch/cluster/slurm.sbatch)"
        )
    tasks_of_nodes = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):  # "4", "4(x2)" or "4(x2),1"
        count, _, nodes = part.rstrip(")").partition("(x")
        tasks_of_nodes += [count] * int(nodes or 1)
    port = 20000 + int(environment["SLURM_JOB_ID"]) % 20000
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": tasks_of_nodes[int(environment["SLURM_NODEID"])],
        "MASTER_ADDR": environment.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }


def stop_process_group() -> None:
    """Leave the process group, once all ranks have come this far."""
    dist.barrier()
    watchdog.disarm()
    dist.destroy_process_group()


def print_rank0(text: str) -> None:
    """Print on rank 0, at once, above a live line of progress if there is one."""
    if dist.get_rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


def run_on_rank0(function: Callable[[], T]) -> T:
    """Call `function` on rank 0. Collective.

    Returns:
        What it returned, on every rank; it must be picklable.

    Raises:
        UserError: on every rank, if `function` raised an error that the user can fix.
        RankZeroError: on the other ranks, if it raised any other error; on rank 0 that error,
            marked for `is_rank0_error`.
    """
    outcome: list = [None]
    fault: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome = [(*_call(function), None)]
        except Exception as error:  # noqa: BLE001 (of any kind: the others wait)
            fault = error
            fault.of_rank0 = True  # see is_rank0_error
            outcome = [(None, None, f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(outcome, src=0)
    if fault is not None:
        raise fault
    value, user_error, fault_text = outcome[0]
    if user_error is not None:
        raise UserError(user_error)
    if fault_text is not None:
        raise RankZeroError(fault_text)
    return value


def try_or_say(what: str, function: Callable[[], object]) -> None:
    """Call `function`; print its error as a line in the place of raising it.

    For what nothing else depends on, made after hours of training.
    """
    try:
        function()
    except Exception as error:  # noqa: BLE001 (of any kind, a full disk too)
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(f"warning: {what} could not be written: {text}", flush=True)


def run_on_each_node(function: Callable[[], T]) -> list[T]:
    """Call `function` on local rank 0 of every node. Collective.

    Returns:
        On every rank, by rank: what its node's local rank 0 returned; it must be picklable.

    Raises:
        UserError: on every rank, if `function` raised an error that the user can fix on any node.
    """
    owners = _find_node_owners()
    is_owner = owners[dist.get_rank()] == dist.get_rank()
    outcomes: list = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, _call(function) if is_owner else None)
    for owner in owners:
        _, error = outcomes[owner]
        if error is not None:
            raise UserError(error)
    return [outcomes[owner][0] for owner in owners]


def find_nodes() -> list[list[int]]:
    """Return the ranks of each node, in ascending order; rank 0's node first. Collective."""
    nodes: dict[int, list[int]] = {}
    for rank, owner in enumerate(_find_node_owners()):
        nodes.setdefault(owner, []).append(rank)
    return list(nodes.values())


def _find_node_owners() -> list[int]:
    """Return, by rank, the global rank of its node's local rank 0. Collective."""
    places: list = [None] * dist.get_world_size()
    dist.all_gather_object(places, (socket.gethostname(), int(os.environ["LOCAL_RANK"])))
    return choose_node_owners(places)


def choose_node_owners(places: Sequence[tuple[str, int]]) -> list[int]:
    """Return, by rank, the global rank of its node's local rank 0.

    Args:
        places: by rank, the name of its host and its local rank.
    """
    owners = []
    for rank, (host, _) in enumerate(places):
        of_host = [i for i, place in enumerate(places) if place == (host, 0)]
        # Hosts may share a name (containers); then the nearest below is the one of the same host.
        # There may be none: deepspeed's local ranks are the global ones modulo the host's slots, and
        # begin at any number where other hosts have other numbers of slots.
        below = [i for i in of_host if i <= rank]
        owners.append(max(below, default=min(of_host, default=rank)))
    return owners


def _call(function: Callable[[], T]) -> tuple[T | None, str | None]:
    """Call `function`. A full disk, or a folder that is gone, counts as an error the user can fix.

    Returns:
        What it returned, and None; or None, and the text of an error that the user can fix.
    """
    try:
        return function(), None
    except USER_ERRORS as error:
        return None, describe_error(error)
    except OSError as error:
        line = describe_shortage(error, watchdog.current_phase()) if is_full_disk(error) else None
        return None, line or f"{error.filename or 'file'}: {error.strerror or error}"
    except SafetensorError as error:  # made of an OSError, without the file's name
        line = describe_shortage(error, watchdog.current_phase()) if is_full_disk(error) else None
        return None, line or f"cannot write or read a file: {error}"


def broadcast_tensor(value: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Return rank 0's `value` on every rank's `device`; the other ranks pass None. Collective."""
    form = [None if value is None else (value.shape, value.dtype)]
    dist.broadcast_object_list(form)
    if value is None:
        shape, dtype = form[0]
        value = torch.empty(shape, dtype=dtype, device=device)
    else:
        value = value.to(device).contiguous()
    dist.broadcast(value, 0)
    return value


def all_reduce_sum(values: list[float], device: torch.device) -> list[float]:
    """Return the sum of each of `values` over the ranks, in fp64. Collective."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def all_reduce_max(value: float, device: torch.device) -> float:
    """Return the largest `value` of any rank. Collective."""
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()
