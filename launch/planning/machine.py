"""The GPUs that a run is planned for: what each can do, and how they are connected.

Light: the command line's options are read into it before torch is imported.
"""

import difflib
from dataclasses import dataclass, replace

from launch.runtime.gpus import GPUS, Gpu, find_gpu
from launch.runtime.units import GIB

# Share of free memory that is kept back: for fragmentation, the libraries' workspaces, buffers of
# the network, and what the estimate is wrong by (docs/engines-and-memory.md).
RESERVE = 0.1
# GiB that are taken before a run measures what is free: by CUDA's context, and by NCCL's buffers
# where there are several GPUs. Assumed: both differ by version and by number of GPUs.
CUDA_CONTEXT, NCCL_BUFFERS = 0.5, 1.0
DEFAULT_GPU = "H100"
# Share of its peak that a GPU, its memory and its links reach. Assumed until bench/gpu.py has run:
# cuBLAS, elementwise kernels and NCCL are commonly measured at 0.6 to 0.9 of them.
EFFICIENCY = 0.6
NODE_SIZE = 8  # GPUs of a node
NETWORK = 50.0  # GB/s of a node, one direction: one adapter of 400 Gbit/s
NUM_CORES = 8  # CPU cores of a GPU


@dataclass(frozen=True)
class Machine:
    """Equal GPUs in equal nodes, with a rank each."""

    name: str  # of the GPU
    gpu: Gpu  # DEFAULT_GPU's rates where the name is not in the table
    world_size: int
    node_size: int = NODE_SIZE  # GPUs of a node
    memory: float | None = None  # GiB of each GPU; None: whether a run fits is not judged
    usable: float | None = None  # bytes of it that a run may fill; None as above
    efficiency: float = EFFICIENCY  # share of the peaks that is reached
    network: float = NETWORK  # GB/s of a node, one direction
    num_cores: int = NUM_CORES  # CPU cores of a GPU

    @property
    def is_known(self) -> bool:
        """Whether the GPU is in the table."""
        return find_gpu(self.name) is not None

    @property
    def num_nodes(self) -> int:
        """Nodes, all but the last one full."""
        return -(-self.world_size // self.node_size)


def make_machine(
    name: str | None, world_size: int, *, memory: float | None = None, **others: float
) -> Machine:
    """Return the machine of `world_size` GPUs called `name`.

    Args:
        name: as torch.cuda.get_device_name() has it, or in short, "H100"; None for DEFAULT_GPU of
            unknown memory.
        memory: GiB of each GPU; None for the table's, if there is a name.
        others: fields of Machine, or of its Gpu, in the place of the defaults.
    """
    known = find_gpu(name or DEFAULT_GPU)
    gpu = known or GPUS[DEFAULT_GPU]
    if memory is None and name is not None and known is not None:
        memory = known.memory
    of_gpu = {key: value for key, value in others.items() if key in Gpu.__dataclass_fields__}
    of_machine = {key: value for key, value in others.items() if key not in of_gpu}
    usable = None if memory is None else count_usable_bytes(memory, world_size)
    return Machine(
        name=name or DEFAULT_GPU,
        gpu=replace(gpu, **of_gpu),
        world_size=world_size,
        memory=memory,
        usable=usable,
        **of_machine,
    )


def count_usable_bytes(memory: float, world_size: int) -> float:
    """Return the bytes of a GPU of `memory` GiB that a run may fill.

    (memory - CUDA_CONTEXT - NCCL_BUFFERS) (1 - RESERVE), without NCCL's on a single GPU.
    """
    libraries = CUDA_CONTEXT + (NCCL_BUFFERS if world_size > 1 else 0.0)
    return max(0.0, memory - libraries) * (1 - RESERVE) * GIB


def describe_machine(machine: Machine) -> str:
    """Return lines to print: the GPU with its source, its memory, and how GPUs are connected."""
    gpu = machine.gpu
    bf16 = "no" if gpu.bf16_tflops is None else f"{gpu.bf16_tflops:g} TFLOP/s in"
    rates = (
        f"{bf16} bf16, {gpu.fp64_tflops:g} in fp64, memory at {gpu.bandwidth:g} GB/s, links at "
        f"{gpu.link:g} GB/s"
    )
    if machine.is_known:
        lines = [f"GPU: {machine.name}: {rates} ({gpu.source})"]
    else:
        near = difflib.get_close_matches(machine.name.upper(), GPUS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        lines = [
            f"GPU: {machine.name} is not in the table of launch/runtime/gpus.py{hint}",
            f"  what no option gives is an {DEFAULT_GPU}'s: {rates}",
        ]
    if machine.usable is None:
        lines.append("  its memory is not given, so whether the run fits is not judged")
    else:
        kept = machine.memory - machine.usable / GIB
        nccl = f", NCCL {NCCL_BUFFERS:g}" if machine.world_size > 1 else ""
        lines.append(
            f"  reserve: {kept:.3g} of {machine.memory:g} GiB (CUDA {CUDA_CONTEXT:g}{nccl}, and "
            f"{RESERVE:.0%} of the rest for fragmentation, workspaces and errors of this estimate)"
        )
    if machine.num_nodes > 1:
        lines.append(
            f"  {machine.num_nodes} nodes of {machine.node_size}, each with {machine.network:g} GB/s "
            "to the others"
        )
    return "\n".join(lines)
