"""Engines shard a model over ranks; the rest of the project sees only the interface of engines.base."""

import torch

from launch.engines.base import Engine


def make_engine(name: str, device: torch.device, dtype: torch.dtype) -> Engine:
    """The engine called `name` in a recipe. Needs a started process group (distributed.start)."""
    if name == "single":
        from launch.engines.single import SingleEngine

        return SingleEngine(device, dtype)
    if name == "fsdp":
        from launch.engines.fsdp import FsdpEngine

        return FsdpEngine(device, dtype)
    from launch.engines.zero import ZeroEngine

    return ZeroEngine(name, device, dtype)


__all__ = ["Engine", "make_engine"]
