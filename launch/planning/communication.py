"""What ranks send one another, by engine, and how long it takes.

The bytes are those of the collectives that the engines call, counted on two ranks
(tests/distributed/test_communication.py).
"""

from dataclasses import dataclass, replace

from launch.engines.base import read_deepspeed_config
from launch.planning.machine import Machine


@dataclass(frozen=True)
class Communication:
    """Bytes of whole tensors that collectives work on; `time_collective` says who sends what.

    Over all ranks, but for those that say otherwise.
    """

    gathered: int = 0  # all-gathers of a micro batch
    scattered: int = 0  # reduce-scatters of a micro batch
    reduced: int = 0  # all-reduces of a micro batch
    step_gathered: int = 0  # all-gathers of an optimiser step
    node_gathered: int = 0  # all-gathers of a micro batch, each node by itself
    node_scattered: int = 0  # reduce-scatters of a micro batch, each node by itself
    nodes_reduced: int = 0  # all-reduces of a micro batch, of what each node has summed


def count_communication(
    engine: str,
    num_elements: int,
    weight_bytes: int,
    trained_bytes: int,
    trains_all: bool,
    in_nodes: bool = False,
) -> Communication:
    """Count what a training communicates on several ranks.

    With W bytes of weights and T bytes of what is trained, in fp32 (of which W is not a part unless
    all is trained):

    - single: nothing.
    - zero2: every rank holds W whole. Each micro batch all-reduces T, as DeepSpeed partitions
      gradients in every backward pass (stage_1_and_2.py, reduce_ready_partitions_and_remove_grads);
      each step all-gathers what was stepped.
    - zero3, zero3_offload, fsdp: each micro batch gathers all weights twice, for the forward and for
      the backward pass, and reduce-scatters T. With gradient checkpointing it is no more: what is
      computed again runs while the layer is gathered for its backward pass (FSDP2's _pre_forward;
      ZeRO-3's __params_to_release). A model of at most stage3_max_live_parameters elements stays
      gathered between both passes under ZeRO-3.
    - fsdp and zero3 with `shard_within: node`: weights are gathered within each node. FSDP2
      reduce-scatters T within each node, and all-reduces it between nodes. ZeRO-3 reduce-scatters T
      over all ranks, and gathers what was stepped once a step, for the nodes' copies of it.

    Args:
        num_elements: of all weights.
        weight_bytes: W, in the dtype that is gathered.
        trained_bytes: T.
        trains_all: whether T is of the weights themselves.
        in_nodes: whether each of several nodes holds the base.
    """
    if engine == "single":
        return Communication()
    if engine == "zero2":
        stepped = weight_bytes if trains_all else trained_bytes
        return Communication(reduced=trained_bytes, step_gathered=stepped)
    num_gathers = 2
    if engine != "fsdp":
        zero = read_deepspeed_config(engine)["zero_optimization"]
        num_gathers = 1 if num_elements <= zero["stage3_max_live_parameters"] else 2
    adapters = 0 if trains_all else trained_bytes
    gathered = num_gathers * (weight_bytes + adapters)
    if not in_nodes:
        return Communication(gathered, scattered=trained_bytes)
    if engine == "fsdp":
        return Communication(
            node_gathered=gathered, node_scattered=trained_bytes, nodes_reduced=trained_bytes
        )
    stepped = weight_bytes if trains_all else trained_bytes
    return Communication(node_gathered=gathered, scattered=trained_bytes, step_gathered=stepped)


def time_collective(num_bytes: float, machine: Machine) -> float:
    """Return the seconds of an all-gather or a reduce-scatter of `num_bytes`.

    On N GPUs in n nodes a GPU receives B (N - 1) / N over its links, and a node B (n - 1) / n over
    its network; the slower of the two counts. An all-reduce is both collectives one after the
    other (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md).
    """
    size = machine.world_size
    within = num_bytes * (size - 1) / size / (machine.gpu.link * 1e9 * machine.efficiency)
    return max(within, _time_network(num_bytes, machine))


def _time_network(num_bytes: float, machine: Machine) -> float:
    """Return the seconds that `num_bytes` take over a node's network; see `time_collective`."""
    nodes = machine.num_nodes
    return num_bytes * (nodes - 1) / nodes / (machine.network * 1e9 * machine.efficiency)


def time_gathering(communication: Communication, machine: Machine) -> float:
    """Return the seconds of a micro batch's all-gathers."""
    node = replace(machine, world_size=min(machine.node_size, machine.world_size))
    within = time_collective(communication.node_gathered, node)
    return time_collective(communication.gathered, machine) + within


def time_micro_batch(communication: Communication, machine: Machine) -> float:
    """Return the seconds of a micro batch's collectives."""
    node = replace(machine, world_size=min(machine.node_size, machine.world_size))
    summed = communication.scattered + 2 * communication.reduced
    return (
        time_gathering(communication, machine)
        + time_collective(summed, machine)
        + time_collective(communication.node_scattered, node)
        # Each GPU all-reduces its own shard; a node's network carries those of all its GPUs.
        + _time_network(2 * communication.nodes_reduced, machine)
    )
