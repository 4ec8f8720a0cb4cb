"""The losses of every engine on one rank against those of `single`, in fp32 and in bf16."""

from pathlib import Path

import torch

from bench.gpu_parts.common import (
    ENGINES,
    find_largest_difference,
    make_small_base,
    make_tokens,
    start_training,
)
from bench.gpu_parts.report import Report, Work
from launch.config.schema import Train
from launch.runtime.distributed import start_process_group, stop_process_group
from launch.training import loop

# Relative, against `single` in the same dtype. The losses move by more than a hundredth.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-3}
BF16_LIMIT = 1e-2  # of `single` in bf16 against fp32
STEPS, EXAMPLES, LENGTH = 5, 8, 64


def measure(work: Work, report: Report) -> None:
    """Train a few steps on each engine in each dtype."""
    device = start_process_group()
    folder = make_small_base(work)
    losses: dict[tuple, list[float]] = {}
    for dtype, limit in LIMITS.items():
        for engine in (*ENGINES, "zero3_offload"):
            name = f"{engine}, {str(dtype).removeprefix('torch.')}"
            losses[engine, dtype] = train_losses(engine, folder, device, dtype)
            report.figures[f"losses of {name}"] = [round(loss, 5) for loss in losses[engine, dtype]]
            if engine != "single":
                difference = find_largest_difference(losses[engine, dtype], losses["single", dtype])
                report.check(
                    f"{name}: losses are single's to {limit:g}",
                    difference <= limit,
                    f"{difference:.1e}",
                )
    difference = find_largest_difference(*(losses["single", dtype] for dtype in LIMITS))
    report.check(
        f"single: losses in bfloat16 are those in float32 to {BF16_LIMIT:g}",
        difference <= BF16_LIMIT,
        f"{difference:.1e}",
    )
    stop_process_group()


def train_losses(
    engine: str, folder: Path, device: torch.device, dtype: torch.dtype
) -> list[float]:
    """Return the losses of a few steps of LoRA."""
    settings = Train(global_batch=EXAMPLES, micro_batch=EXAMPLES // 2, lr=1e-2, checkpoint_every=1)
    tokens = make_tokens(EXAMPLES, LENGTH, 100)
    plan = [list(range(EXAMPLES))] * STEPS
    with start_training(engine, folder, device, dtype, 8, settings) as (_, state):
        return [step["loss"] for step in loop.train(state, tokens, plan, settings, device)]
