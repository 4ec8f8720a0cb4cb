"""lora_small/: the run's LoRA for the original base, cut to a smaller rank."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from astra.adapter import ADAPTER, Factors, get_lora_layers, read_factors, read_head
from astra.plain_lora import (
    Truncation,
    get_scaling,
    join_factors,
    save_plain_lora,
    truncate_product,
)
from launch.data.inputs import Inputs
from launch.engines import Engine
from launch.run.results import SmallExport
from launch.runtime import watchdog
from launch.runtime.distributed import run_on_rank0
from launch.training.export import name_base, note_base, starts_on_residual
from launch.training.trainable import choose_smallest

FOLDER = "lora_small"


def save_small_lora(
    folder: Path,
    model: PeftModel,
    engine: Engine,
    inputs: Inputs,
    initial: Mapping[str, Factors],
    rank: int,
    keep_dropped: bool,
    rehearsal: bool = False,
) -> tuple[SmallExport, dict[str, Factors]]:
    """Cut the change of every module to `rank`, and write them as one LoRA. Collective.

    Args:
        folder: of the run.
        initial: on rank 0, A0 and B0 by module name.
        keep_dropped: whether to return what is left out.
        rehearsal: try it with the smallest module alone.

    Returns:
        The errors, and the left out products by module name, on every rank; empty if not kept.
    """
    layers = get_lora_layers(model)
    if rehearsal:
        layers = choose_smallest(layers)
    trained, head = read_factors(layers, engine), read_head(model, engine)
    config = model.peft_config[ADAPTER]
    on_residual = starts_on_residual(initial)
    cut: dict[str, Truncation] = {}  # on rank 0

    def truncate(name: str) -> Factors | None:
        watchdog.heartbeat()
        product = join_factors(
            trained[name], initial[name] if on_residual else None, get_scaling(config)
        )
        # On a GPU, if there is one: large bases have hundreds of modules.
        product = Factors(*(factor.to(engine.device) for factor in product))
        found = truncate_product(product, rank, trained[name].a.dtype)
        kept, dropped = (
            Factors(*(factor.cpu().clone() for factor in part))  # a view is sent with all it views
            for part in (found.kept, found.dropped)
        )
        cut[name] = found._replace(kept=kept, dropped=dropped)
        return dropped if keep_dropped else None

    dropped = {name: run_on_rank0(partial(truncate, name)) for name in layers}

    def write() -> SmallExport:
        kept = {name: found.kept for name, found in cut.items()}
        save_plain_lora(folder / FOLDER, *name_base(config, inputs.base), kept, head)
        note_base(folder / FOLDER, inputs.base, "original")
        return _sum_errors(cut, rank)

    return run_on_rank0(write), dropped if keep_dropped else {}


def _sum_errors(cut: Mapping[str, Truncation], rank: int) -> SmallExport:
    """Return the relative error of all modules together, and of the worst."""
    errors = {name: found.error / found.norm if found.norm else 0.0 for name, found in cut.items()}
    worst = max(errors, key=errors.__getitem__)
    error = math.hypot(*(found.error for found in cut.values()))
    norm = math.hypot(*(found.norm for found in cut.values()))
    return SmallExport(
        rank=rank,
        error=error / norm if norm else 0.0,
        worst_module=worst,
        worst_error=errors[worst],
    )


@contextmanager
def without_products(
    layers: Mapping[str, LoraLayer], products: Mapping[str, Factors], device: torch.device
) -> Iterator[None]:
    """Return a context in which the layers of `products` compute their outputs minus `B A x`.

    So the model is, without a change of its (sharded) weights, what it is with the small LoRA.
    """
    handles = []
    for name, product in products.items():
        a, b = (factor.to(device) for factor in product)
        if len(a):
            handles.append(layers[name].register_forward_hook(partial(_subtract, a, b)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _subtract(a: Tensor, b: Tensor, _layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """Return a layer's output minus B A x, which is computed in the factors' dtype."""
    product = F.linear(F.linear(inputs[0].to(a.dtype), a), b)
    return (output - product).to(output.dtype)
