"""Engines hold a model, whole or sharded over ranks. The project sees only engines.base.Engine.

A new engine is a file here and a case in `make_engine`. Its name goes into `Recipe.engine`, into
the choices of launch/evaluate.py if it can score, and into launch/planning, which counts its memory,
bytes and time.
"""

import torch

from launch.engines.base import Engine
from launch.engines.nodes import choose_nodes


def make_engine(
    name: str, device: torch.device, dtype: torch.dtype, shard_within: str = "all"
) -> Engine:
    """Make the engine that a recipe calls `name`. Needs a started process group. Collective.

    Args:
        dtype: of the frozen base and of its forward passes.
        shard_within: the recipe's field; `node` for fsdp and zero3 only.

    Raises:
        UserError: on every rank, if the ranks are not placed as `shard_within` needs it.
    """
    nodes = choose_nodes(name) if shard_within == "node" else None
    # fp32 products on GPUs: with a bf16 base they are an adapter's or a new head's, for which TF32's
    # 11 significant bits are enough. An fp32 base keeps fp32.
    torch.set_float32_matmul_precision("high" if dtype == torch.bfloat16 else "highest")
    # Imported here because each of these libraries takes seconds to import.
    match name:
        case "single":
            from launch.engines.single import SingleEngine

            return SingleEngine(device, dtype)
        case "fsdp":
            from launch.engines.fsdp import FsdpEngine

            return FsdpEngine(device, dtype, nodes)
        case _:  # the others are DeepSpeed's, one for each file in ds_configs/
            from launch.engines.zero import ZeroEngine

            return ZeroEngine(name, device, dtype, node_size=len(nodes[0]) if nodes else None)


__all__ = ["Engine", "make_engine"]
