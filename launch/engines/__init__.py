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
    # fp32 products on GPUs: with a bf16 base they are an adapter's, for which TF32's 11 significant
    # bits are more than enough. An fp32 base keeps fp32.
    torch.set_float32_matmul_precision("high" if dtype == torch.bfloat16 else "highest")
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
