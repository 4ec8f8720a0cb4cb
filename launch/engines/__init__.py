"""Engines hold a model, whole or sharded over ranks. The project sees only engines.base.Engine.

A new engine is one file here and one line in `make_engine`.
"""

import torch

from launch.engines.base import Engine


def make_engine(name: str, device: torch.device, dtype: torch.dtype) -> Engine:
    """Make the engine that a recipe calls `name`. Needs a started process group.

    Args:
        dtype: of the frozen base and of its forward passes.
    """
    # Imported here because each of these libraries takes seconds to import.
    match name:
        case "single":
            from launch.engines.single import SingleEngine

            return SingleEngine(device, dtype)
        case "fsdp":
            from launch.engines.fsdp import FsdpEngine

            return FsdpEngine(device, dtype)
        case _:  # the others are DeepSpeed's, one for each file in ds_configs/
            from launch.engines.zero import ZeroEngine

            return ZeroEngine(name, device, dtype)


__all__ = ["Engine", "make_engine"]
