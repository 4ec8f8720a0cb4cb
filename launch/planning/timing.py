"""How long a run takes: its GPUs, their hosts and the links between them.

What happens at the same time is taken to hide all but the slowest, so times are lower bounds where
overlap is not perfect; that every example is max_length long makes them upper bounds otherwise.
"""

import functools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.calibration.solvers import GPU_EFFICIENCY, estimate_solve_seconds
from launch.config.schema import Recipe
from launch.planning.communication import (
    Communication,
    count_communication,
    time_collective,
    time_gathering,
    time_micro_batch,
)
from launch.planning.counting import Operation
from launch.planning.machine import Machine
from launch.planning.memory import FP32_BYTES, is_offloaded
from launch.planning.model import CalibrationBatch, FakeModel, ModelRun

# Host time of a micro batch by engine, from bench/host.py.
HOST = Path(__file__).resolve().parents[2] / "bench" / "results" / "host.json"
# `single` was not measured: it has less to do than zero2. Nor was zero3_offload.
SAME_HOST_TIME = {"single": "zero2", "zero3_offload": "zero3"}
# Measured with gradient checkpointing: forward, forward again, and a backward pass of two forwards.
FORWARD_SHARE, NO_CHECKPOINTING_SHARE = 0.25, 0.75
# Of a parameter: its value, gradient and moments are read, all but the gradient written.
ADAMW_BYTES = 28
HOST_BANDWIDTH = 20.0  # GB/s of main memory for each rank; assumed


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimiser step."""

    micro_batch: dict[str, float]  # what works at the same time -> its seconds of a micro batch
    num_micro_batches: int
    after: float  # once a step: the optimiser, and gathering what it stepped

    @property
    def seconds(self) -> float:
        """num_micro_batches times the slowest of a micro batch, and what comes after."""
        return self.num_micro_batches * max(self.micro_batch.values()) + self.after

    @property
    def bound(self) -> str:
        """What a micro batch waits for."""
        return max(self.micro_batch, key=self.micro_batch.get)


@dataclass(frozen=True)
class CalibrationTime:
    """Seconds of a calibration, by stage; they follow one another."""

    passes: float
    sums: float  # fp64
    reduction: float  # of the sums, over ranks
    solving: float  # fp64
    solver: str  # where and how

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.passes + self.sums + self.reduction + self.solving


def time_operations(operations: Counter[Operation], machine: Machine, dtype: torch.dtype) -> float:
    """Return a GPU's seconds for `operations`, by the roofline.

    Each takes the longer of flops / peak and traffic / bandwidth, both times the share that is
    reached (Williams, Waterman and Patterson, CACM 52, 2009). Products of bf16 have bf16's peak.
    fp32 products beside a bf16 base run in TF32, and those of an fp32 base in fp32, as
    launch.engines.make_engine sets it. Without bf16 in hardware fp32's peak is taken.

    Args:
        dtype: of the base.
    """
    gpu = machine.gpu
    fp32 = gpu.tf32_tflops if dtype == torch.bfloat16 else gpu.fp32_tflops
    seconds = 0.0
    for operation, count in operations.items():
        peak = gpu.bf16_tflops or gpu.fp32_tflops if operation.is_bf16 else fp32
        arithmetic = operation.flops / (peak * 1e12)
        seconds += count * max(arithmetic, operation.traffic / (gpu.bandwidth * 1e9))
    return seconds / machine.efficiency


def time_placing(num_bytes: float, machine: Machine) -> float:
    """Return a GPU's seconds for putting gathered weights in their places.

    The collective writes each byte into a buffer, and a copy reads and writes it again (FSDP2's
    foreach_all_gather_copy_out; the torch.cat of ZeRO-3's AllGatherCoalescedHandle.wait). Nothing is
    gathered on a single rank.
    """
    if machine.world_size == 1:
        return 0.0
    return 3 * num_bytes / (machine.gpu.bandwidth * 1e9 * machine.efficiency)


@functools.cache
def _read_host_seconds() -> dict[str, float]:
    """Read the host's seconds of a micro batch and layer, by engine, as bench/host.py left them."""
    record = json.loads(HOST.read_text(encoding="utf-8"))
    milliseconds = record["milliseconds"]
    return {engine: value / 1000 / record["layers"] for engine, value in milliseconds.items()}


def time_host(engine: str, num_layers: int, checkpointing: bool) -> float:
    """Return the host's seconds for a micro batch: its measured time a layer, times the layers."""
    share = 1.0 if checkpointing else NO_CHECKPOINTING_SHARE
    return share * num_layers * _read_host_seconds()[SAME_HOST_TIME.get(engine, engine)]


def count_training_communication(engine: str, fake: FakeModel, in_nodes: bool) -> Communication:
    """Count what the training of a model communicates; see `count_communication`."""
    trained_bytes = FP32_BYTES * fake.num_trained
    return count_communication(
        engine, fake.num_parameters, fake.weight_bytes, trained_bytes, fake.trains_all, in_nodes
    )


def time_step(
    run: ModelRun, engine: str, checkpointing: bool, machine: Machine, in_nodes: bool = False
) -> StepTime:
    """Return the time of an optimiser step.

    A micro batch takes as long as the slowest of the GPU (`time_operations`, and `time_placing` of
    what it gathers), the host (`time_host`), the links (`time_micro_batch`) and, where weights are in
    main memory, the way to it. After the last one AdamW moves 28 bytes a parameter that a rank
    steps, and ZeRO-2, or ZeRO-3 where each node holds the base, gathers what was stepped.

    Args:
        in_nodes: whether each of several nodes holds the base.
    """
    fake, size = run.fake, machine.world_size
    communication = count_training_communication(engine, fake, in_nodes)
    num_layers = len(fake.layer_bytes)
    operations = run.training[checkpointing].operations
    micro_batch = {
        "GPU": time_operations(operations, machine, fake.dtype)
        + time_placing(communication.gathered + communication.node_gathered, machine),
        "host": time_host(engine, num_layers, checkpointing),
        "links": time_micro_batch(communication, machine),
    }
    if machine.num_nodes > 1:
        micro_batch["network"] = micro_batch.pop("links")
    bandwidth = machine.gpu.bandwidth
    if is_offloaded(engine):
        # A rank's shard goes up for each gathering, and its gradients come down.
        moved = communication.gathered + communication.scattered
        micro_batch["PCIe"] = moved / size / (machine.gpu.pcie * 1e9 * machine.efficiency)
        bandwidth = HOST_BANDWIDTH
    shards = 1 if engine == "single" else size
    if in_nodes and engine == "fsdp":  # each node steps all
        shards = machine.node_size
    stepped = ADAMW_BYTES * fake.num_trained / shards / (bandwidth * 1e9 * machine.efficiency)
    after = stepped + time_collective(communication.step_gathered, machine)
    return StepTime(micro_batch, run.num_micro_batches, after)


def time_calibration(
    run: ModelRun,
    recipe: Recipe,
    engine: str,
    machine: Machine,
    num_passes: int,
    sum_flops: float,
    statistics_bytes: int,
    in_nodes: bool,
) -> CalibrationTime:
    """Return the time of the recipe's calibration.

    A batch takes as long as the slowest of GPU, host (a quarter of a micro batch's time for a
    forward pass, three quarters with a backward pass) and links (the gathered weights, half of a
    micro batch's for a forward pass). Sums are fp64 products at GPU_EFFICIENCY of the peak. Their
    reduction is an all-reduce, or half of one with calibration.reduction owner. How modules are
    solved: launch.calibration.solvers.

    Args:
        num_passes: passes over the samples.
        sum_flops: of the sums, over all ranks.
        statistics_bytes: of the sums of all windows, on each rank.
        in_nodes: whether each of several nodes holds the base.
    """
    fake, size, batch = run.fake, machine.world_size, run.calibration
    settings = recipe.calibration
    num_batches = -(-settings.samples // (settings.batch_size * size)) if batch.once.flops else 0
    training = count_training_communication(engine, fake, in_nodes)
    share = 1.0 if batch.has_backward else 0.5
    parts = [
        time_operations(batch.once.operations or Counter(), machine, fake.dtype)
        + share * time_placing(training.gathered + training.node_gathered, machine),
        _time_host_pass(engine, len(fake.layer_bytes), batch),
        share * time_gathering(training, machine),
    ]
    reduced = 2 * statistics_bytes if settings.reduction == "all" else statistics_bytes
    lora_ranks = dict.fromkeys(fake.linears, recipe.adapter.rank)
    solving, solver = estimate_solve_seconds(
        batch.groups,
        fake.linears,
        lora_ranks,
        recipe.adapter.method_record.decomposition,
        machine.gpu,
        machine.num_cores,
        size,
    )
    return CalibrationTime(
        passes=num_passes * num_batches * max(parts),
        sums=sum_flops / size / (machine.gpu.fp64_tflops * 1e12 * GPU_EFFICIENCY),
        reduction=time_collective(reduced if batch.once.flops else 0, machine),
        solving=solving,
        solver=solver,
    )


def _time_host_pass(engine: str, num_layers: int, batch: CalibrationBatch) -> float:
    """Return the host's seconds for a batch of a calibration."""
    share = NO_CHECKPOINTING_SHARE if batch.has_backward else FORWARD_SHARE
    return share * time_host(engine, num_layers, checkpointing=True)
