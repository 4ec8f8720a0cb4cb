"""Which ranks share a model's shards: all of them, or those of each node (`shard_within: node`)."""

from launch.runtime.distributed import find_nodes, print_rank0
from launch.runtime.errors import UserError

FIELD = "shard_within"


def choose_nodes(engine: str) -> list[list[int]] | None:
    """Return the ranks of each node, if each node is to hold a whole base. Collective.

    Args:
        engine: `fsdp` or `zero3`.

    Returns:
        As many ranks of every node; None if there is one node, where it makes no difference.

    Raises:
        UserError: on every rank, if the nodes cannot share the work in this way.
    """
    nodes = find_nodes()
    sizes = sorted({len(ranks) for ranks in nodes})
    if len(nodes) == 1:
        print_rank0(f"{FIELD}: node is the same as all here, as there is one node")
        return None
    if len(sizes) > 1:
        raise UserError(
            f"{FIELD}: node needs equally many ranks on every node, and these have "
            f"{sizes[0]} to {sizes[-1]}; start as many on each, or set {FIELD}=all"
        )
    if sizes == [1]:
        raise UserError(
            f"{FIELD}: node with one rank on each node would shard nothing; set {FIELD}=all, or "
            "engine=zero2 if the base fits one device"
        )
    in_order = [rank for ranks in nodes for rank in ranks]
    if engine == "zero3" and in_order != sorted(in_order):  # hpZ's groups are consecutive ranks
        raise UserError(
            f"{FIELD}: node with zero3 needs consecutive ranks on each node, and these are "
            f"{nodes}; place them so (Slurm: --distribution=block), or set engine=fsdp"
        )
    print_rank0(
        f"{FIELD}: node: each of {len(nodes)} nodes holds the base, a shard on each of its "
        f"{sizes[0]} ranks"
    )
    return nodes


def count_node_ranks() -> int | None:
    """Return the ranks of each node, the least of all nodes; None on one node. Collective."""
    nodes = find_nodes()
    return None if len(nodes) == 1 else min(map(len, nodes))
