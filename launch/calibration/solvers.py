"""Where a calibration's modules are solved, and how long it takes: on the GPU, or on the CPU where
that is sooner."""

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import threadpoolctl
import torch
import torch.distributed as dist
from torch import nn

from astra.eigen import CUSOLVER_ROWS
from astra.flops import (
    Decomposition,
    count_eigh_flops,
    count_forming_flops,
    count_solve_flops,
)
from astra.moments import Group
from launch.runtime.distributed import all_reduce_max
from launch.runtime.gpus import SLOW_FP64_TFLOPS, Gpu, find_gpu

GPU_EFFICIENCY = 0.4  # share of a GPU's fp64 peak that is reached: bench/gpu.py's goal, 25 of 67
# fp64 operations a second of cuSOLVER's syevd on a GPU with fast fp64. It waits for memory and for
# the host, so no peak says it: assumed is bench/gpu.py's goal, 4,096 rows in 1.5 s on an H100. No
# GPU has been measured.
GPU_EIGH_RATE = (14 / 3) * 4096**3 / 1.5
# fp64 operations a second of one CPU core, measured on one layer of LLaMA2-7B's shape
# (bench/results/calibration.json): matrix products, and the solvers, whose half is bound by memory.
CORE_PRODUCT_RATE = 38e9
CORE_SOLVER_RATE = 13e9


def count_core_seconds(
    groups: Sequence[Group],
    linears: Mapping[str, nn.Linear],
    lora_ranks: Mapping[str, int],
    decomposition: Decomposition,
) -> float:
    """Count the seconds that one CPU core takes to solve all modules of `groups`."""
    forming = 0
    if decomposition == "output":
        for group in groups:
            for name in group.modules:
                forming += count_forming_flops(group.statistic, linears[name])
    total = sum(count_solve_flops(group, linears, lora_ranks, decomposition) for group in groups)
    return forming / CORE_PRODUCT_RATE + (total - forming) / CORE_SOLVER_RATE


def count_gpu_seconds(
    groups: Sequence[Group],
    linears: Mapping[str, nn.Linear],
    lora_ranks: Mapping[str, int],
    decomposition: Decomposition,
    gpu: Gpu,
) -> float:
    """Count the seconds that one GPU takes to solve all modules of `groups`.

    Products run at GPU_EFFICIENCY of the fp64 peak, and eigendecompositions, of which cuSOLVER
    computes all vectors, at that or GPU_EIGH_RATE, whichever is less.
    """
    product_rate = gpu.fp64_tflops * 1e12 * GPU_EFFICIENCY
    total = eigh = 0
    for group in groups:
        total += count_solve_flops(group, linears, lora_ranks, decomposition, "cuda")
        for name in group.modules:
            rows = _count_rows(group, linears[name], decomposition)
            eigh += count_eigh_flops(rows, lora_ranks[name], "cuda")
    return eigh / min(product_rate, GPU_EIGH_RATE) + (total - eigh) / product_rate


def _count_rows(group: Group, linear: nn.Linear, decomposition: Decomposition) -> int:
    """Return the rows of the symmetric matrix whose eigenvectors are computed for a module."""
    if decomposition == "input":
        return linear.in_features
    if decomposition == "matrix" or group.statistic == "input":
        return min(linear.in_features, linear.out_features)
    return linear.out_features


def compare_solvers(
    gpu: Gpu | None, num_cores: int, gpu_seconds: float, core_seconds: float
) -> float | None:
    """Return the seconds on the CPU where that is known to be sooner than the GPU, else None.

    Args:
        gpu: None for one that is not in the table, which counts as fast.
        num_cores: CPU cores of a rank.
        gpu_seconds: of a rank's problems on the GPU.
        core_seconds: of the same problems on one core.
    """
    if gpu is None or gpu.fp64_tflops >= SLOW_FP64_TFLOPS:
        return None
    on_cpu = core_seconds / num_cores
    return on_cpu if on_cpu < gpu_seconds else None


def estimate_solve_seconds(
    groups: Sequence[Group],
    linears: Mapping[str, nn.Linear],
    lora_ranks: Mapping[str, int],
    decomposition: Decomposition,
    gpu: Gpu,
    num_cores: int,
    world_size: int,
) -> tuple[float, str]:
    """Estimate the seconds in which the ranks solve all modules, each its equal share.

    `count_gpu_seconds`, and `count_core_seconds` for matrices of more than CUSOLVER_ROWS rows; or
    the latter for all where that is sooner.

    Returns:
        Seconds, and where that is in a few words.
    """
    problem = (linears, lora_ranks, decomposition)
    large = []
    for group in groups:
        if any(
            _count_rows(group, linears[n], decomposition) > CUSOLVER_ROWS for n in group.modules
        ):
            large.append(group)
    small = [group for group in groups if group not in large]
    on_gpu = count_gpu_seconds(small, *problem, gpu)
    on_gpu += count_core_seconds(large, *problem) / num_cores
    core_seconds = count_core_seconds(groups, *problem)
    on_cpu = compare_solvers(gpu, num_cores, on_gpu / world_size, core_seconds / world_size)
    cores = f"{num_cores} CPU cores a GPU"
    if on_cpu is not None:
        return on_cpu, f"on {cores}, which are sooner than a GPU this slow in fp64"
    where = f"on the GPU, above {CUSOLVER_ROWS:,} rows on {cores}" if large else "on the GPU"
    return on_gpu / world_size, where


def choose_solve_device(
    device: torch.device,
    groups: Sequence[Group],
    linears: Mapping[str, nn.Linear],
    lora_ranks: Mapping[str, int],
    decomposition: Decomposition,
) -> tuple[torch.device, str | None]:
    """Return where all ranks solve their modules, and the line to print of it. Collective.

    The CPU is taken in the place of a GPU only if it is sooner on every rank.
    """
    if device.type != "cuda":
        return device, None
    world_size, num_cores = dist.get_world_size(), count_own_cores()
    problem = (groups, linears, lora_ranks, decomposition)
    name = torch.cuda.get_device_name(device)
    gpu = find_gpu(name)
    on_gpu = count_gpu_seconds(*problem, gpu) / world_size if gpu is not None else 0.0
    on_cpu = compare_solvers(gpu, num_cores, on_gpu, count_core_seconds(*problem) / world_size)
    if all_reduce_max(float(on_cpu is None), device):
        return device, None
    line = (
        f"calibration: solved on the CPUs, {on_cpu:.2g} s by estimate on {num_cores} cores a rank; "
        f"{name} is slow in fp64 and would take {on_gpu:.2g} s"
    )
    return torch.device("cpu"), line


def count_own_cores() -> int:
    """Return this rank's share of the CPU cores that it may run on, at least 1. Collective."""
    cores = sorted(os.sched_getaffinity(0))
    place = (socket.gethostname(), cores)  # launchers such as srun may give each rank its own cores
    places: list = [None] * dist.get_world_size()
    dist.all_gather_object(places, place)
    return max(1, len(cores) // places.count(place))


@contextmanager
def use_cores(count: int) -> Iterator[None]:
    """Within the context, compute with `count` threads on the CPU.

    On GPU machines torchrun leaves each rank one thread, which is too few where a solver runs on
    the CPU.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpoolctl.threadpool_limits(count, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)
