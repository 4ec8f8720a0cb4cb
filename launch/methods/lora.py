"""LoRA (arXiv 2106.09685) and PEFT's variants of it: A0 drawn at random, B0 = 0, no calibration."""

from dataclasses import replace
from typing import TYPE_CHECKING

from launch.methods.base import Method, MethodSettings

if TYPE_CHECKING:
    from torch import Tensor


def make_factors(
    name: str, weight: "Tensor", lora_rank: int, settings: MethodSettings, _solution: None
) -> "tuple[Tensor, Tensor]":
    """Draw A0 from (train.seed, module name)."""
    from astra.inits import init_lora

    return init_lora(weight, lora_rank, settings.train_seed, name)


METHOD = Method(make_factors=make_factors)
RSLORA = replace(METHOD, use_rslora=True)  # arXiv 2312.03732
DORA = replace(METHOD, use_dora=True)  # arXiv 2402.09353
