"""Where a calibration's modules are solved: on the GPU, or on the CPU where that is sooner."""

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import threadpoolctl
import torch
import torch.distributed as dist
from torch import nn

from astra.flops import Decomposition, count_forming_flops, count_solve_flops
from astra.moments import Group
from launch.runtime.distributed import all_reduce_max
from launch.runtime.gpus import SLOW_FP64_TFLOPS, Gpu, find_gpu

GPU_EFFICIENCY = 0.4  # share of a GPU's peak that is reached, as launch/plan.py has it by default
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


def compare_solvers(
    gpu: Gpu | None, num_cores: int, gpu_flops: float, core_seconds: float
) -> tuple[float, float] | None:
    """Return the seconds on the CPU and on the GPU where the CPU is known to be sooner, else None.

    Args:
        gpu: None for one that is not in the table, which counts as fast.
        num_cores: CPU cores of a rank.
        gpu_flops: fp64 operations of a rank's problems on the GPU.
        core_seconds: seconds of the same problems on one core.
    """
    if gpu is None or gpu.fp64_tflops >= SLOW_FP64_TFLOPS:
        return None
    on_gpu = gpu_flops / (gpu.fp64_tflops * 1e12 * GPU_EFFICIENCY)
    on_cpu = core_seconds / num_cores
    return (on_cpu, on_gpu) if on_cpu < on_gpu else None


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
    flops = sum(
        count_solve_flops(group, linears, lora_ranks, decomposition, "cuda") for group in groups
    )
    core_seconds = count_core_seconds(groups, linears, lora_ranks, decomposition) / world_size
    name = torch.cuda.get_device_name(device)
    seconds = compare_solvers(find_gpu(name), num_cores, flops / world_size, core_seconds)
    if all_reduce_max(float(seconds is None), device):
        return device, None
    on_cpu, on_gpu = seconds
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
