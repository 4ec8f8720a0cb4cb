"""The dtypes of the adapters' products, and of what is summed over ranks, on a bf16 base."""

from pathlib import Path

import torch
from torch import Tensor, nn

from bench.gpu_parts.common import make_small_base, make_tokens, start_training
from bench.gpu_parts.report import Report, Work
from launch.config.schema import Train
from launch.runtime.distributed import start_process_group, stop_process_group
from launch.training import loop
from tests.distributed.workers.gradient_dtypes import record_sums


def measure(work: Work, report: Report) -> None:
    """Train two steps on each engine and record dtypes."""
    device = start_process_group()
    folder = make_small_base(work)
    with record_sums() as summed:  # once, since DeepSpeed keeps the functions that it finds first
        for engine in ("zero3", "zero2", "fsdp", "single"):
            summed.clear()
            found = train_recorded(engine, folder, device) | {"sums over ranks": sorted(summed)}
            report.figures[engine] = found
            report.check(
                f"{engine}: products of adapters are bf16",
                found["products"] == ["torch.bfloat16"],
                found["products"],
            )
            report.check(
                f"{engine}: adapters are fp32",
                found["adapters"] == ["torch.float32"],
                found["adapters"],
            )
            # On one rank ZeRO sums all the same; FSDP2 and single need not.
            allowed = [["torch.float32"]] if engine.startswith("zero") else [["torch.float32"], []]
            report.check(
                f"{engine}: nothing but fp32 is summed over ranks",
                found["sums over ranks"] in allowed,
                found["sums over ranks"],
            )
    stop_process_group()


def train_recorded(engine: str, folder: Path, device: torch.device) -> dict[str, list[str]]:
    """Train two steps; return the dtypes of the adapters and of their products."""
    settings = Train(global_batch=4, micro_batch=2, lr=1e-3, checkpoint_every=1)
    tokens = make_tokens(4, 32, 100)
    products: set[str] = set()

    def record(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        products.add(str(output.dtype))

    with start_training(engine, folder, device, torch.bfloat16, 8, settings) as (model, state):
        for name, module in model.named_modules():
            if ".lora_A." in name or ".lora_B." in name:
                module.register_forward_hook(record)
        list(loop.train(state, tokens, [[0, 1, 2, 3]] * 2, settings, device))
        adapters = {str(p.dtype) for p in model.parameters() if p.requires_grad}
    return {"products": sorted(products), "adapters": sorted(adapters)}
