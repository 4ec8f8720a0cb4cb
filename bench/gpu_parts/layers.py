"""Four layers of real width: every engine, and the HF Trainer with PEFT on the same tokens.

bf16, r = 128 on all seven kinds of linear layers, micro batches of 8 x 512 tokens. Without gradient
checkpointing, since four layers fit everywhere; `single` is measured with it too.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bench.gpu_parts.common import (
    ENGINES,
    Shape,
    free_memory,
    make_base,
    make_tokens,
    start_training,
)
from bench.gpu_parts.report import Report, Work, synchronise
from bench.training import make_trainer, write_tokenizer
from launch.config.schema import Train
from launch.data.token_set import TokenSet
from launch.runtime.distributed import start_process_group, stop_process_group
from launch.training import loop
from launch.training.flops import count_training_flops, find_peak_flops

SHAPES = {  # and the vocabulary
    "7B": (Shape(4, 4096, 11008, 32, 32), 32000),
    "8B": (Shape(4, 4096, 14336, 32, 8), 128256),
}
TINY = {"tiny": (Shape(2, 64, 176, 4, 2), 256)}
GOAL_MFU, GOAL_AGAINST_TRAINER, GOAL_AGAINST_SINGLE = 0.35, 1.3, 0.85
MICRO_BATCHES = 2  # of a step
# What waits for the device, by the names that the profiler gives it.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def measure(work: Work, report: Report) -> None:
    """Measure every width under every engine and the HF Trainer."""
    device = start_process_group()
    size, length, rank, steps = (2, 64, 8, 3) if work.tiny else (8, 512, 128, 10)
    rows = size * MICRO_BATCHES
    settings = Train(global_batch=rows, micro_batch=size, lr=1e-4, checkpoint_every=1000)
    for name, (shape, vocabulary) in (TINY if work.tiny else SHAPES).items():
        folder = work.folder / f"layers-{name}"
        make_base(folder, shape, vocabulary, torch.bfloat16, device)
        free_memory()
        tokens = make_tokens(rows, length, vocabulary)
        found = {"single": time_engine("single", folder, device, rank, settings, tokens, steps)}
        flops = found["single"].pop("flops of a step")
        # Before ZeRO-3, with whose help transformers would load any later model.
        found["HF Trainer"] = time_trainer(folder, rank, settings, tokens, steps)
        for engine in ENGINES[1:]:
            found[engine] = time_engine(engine, folder, device, rank, settings, tokens, steps)
        found["single, checkpointing"] = time_engine(
            "single", folder, device, rank, settings, tokens, steps, checkpointing=True
        )
        for figures in found.values():
            figures.pop("flops of a step", None)
            figures["tokens/s"] = round(rows * length / figures["seconds of a step"])
            figures["MFU"] = find_utilisation(flops, figures["seconds of a step"], device)
        for label, figures in found.items():
            report.figures[f"{name}, {label}"] = figures
        judge(name, found, report)
    stop_process_group()


def time_engine(
    engine: str,
    folder: Path,
    device: torch.device,
    rank: int,
    settings: Train,
    tokens: TokenSet,
    steps: int,
    checkpointing: bool = False,
) -> dict:
    """Train on one engine; return the seconds of a step, memory, waits and the GPU's idle share."""
    plan = [list(range(settings.global_batch))] * (steps + 1)
    started = start_training(engine, folder, device, torch.bfloat16, rank, settings, checkpointing)
    with started as (model, state):
        counts = count_training_flops(model.get_base_model()) if engine == "single" else None
        flops = counts.count_step(tokens.lengths(), sum_answers(tokens)) if counts else None
        # The loop waits for the device after its first step and after its last.
        ends = []
        for _ in loop.train(state, tokens, plan, settings, device):
            ends.append(time.perf_counter())
        seconds = (ends[-1] - ends[0]) / steps
        peak = peak_gib()
        observed = observe(lambda: list(loop.train(state, tokens, plan[:3], settings, device)), 3)
    busy = observed.pop("device seconds of a step")
    idle = None if busy is None else round(max(0.0, 1 - busy / seconds), 3)
    return {
        "seconds of a step": round(seconds, 4),
        "peak GiB": peak,
        "GPU idle share": idle,
        "flops of a step": flops,
        **observed,
    }


def sum_answers(tokens: TokenSet) -> int:
    """Return the number of answer tokens of all rows."""
    return tokens.count_answer_tokens(list(range(len(tokens))))


def observe(run: Callable[[], object], steps: int) -> dict:
    """Profile `run`, which trains `steps` steps; None for all figures without a GPU.

    The time of the device's kernels hardly depends on the profiler, unlike the host's; so the share
    of a step in which the GPU waits for its host is 1 - this time / the seconds of a step without
    the profiler.
    """
    if not torch.cuda.is_available():
        run()
        return {"device seconds of a step": None, "waits of a step": None}
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
        synchronise()
    microseconds, waits = 0.0, dict.fromkeys(WAITS, 0)
    for event in seen.events():
        if event.name in waits:
            waits[event.name] += 1
        elif event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            microseconds += event.time_range.elapsed_us()
    return {
        "device seconds of a step": microseconds / 1e6 / steps,
        "waits of a step": {name: round(count / steps, 1) for name, count in waits.items()},
    }


def peak_gib() -> float | None:
    """Return the most GiB that PyTorch held on the GPU since `free_memory`."""
    if not torch.cuda.is_available():
        return None
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def time_trainer(folder: Path, rank: int, settings: Train, tokens: TokenSet, steps: int) -> dict:
    """Train as many steps with the HF Trainer; return the seconds of a step and memory."""
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            **_others: object,
        ) -> None:
            if state.global_step in (1, steps + 1):
                synchronise()
                ends.append(time.perf_counter())

    free_memory()
    write_tokenizer(folder)
    variables = dict(os.environ)  # it takes some away
    trainer = make_trainer(
        folder,
        tokens,
        torch.bfloat16,
        rank=rank,
        micro_batch=settings.micro_batch,
        accumulation=MICRO_BATCHES,
        steps=steps + 1,
        callback=Clock(),
    )
    trainer.train()
    os.environ |= variables
    figures = {"seconds of a step": round((ends[1] - ends[0]) / steps, 4), "peak GiB": peak_gib()}
    return figures


def find_utilisation(flops: float | None, seconds: float, device: torch.device) -> float | None:
    """Return the share of the device's peak in bf16; None where the peak is not known."""
    peak = find_peak_flops(device, torch.bfloat16)
    return round(flops / seconds / peak, 3) if flops and peak else None


def judge(name: str, found: dict[str, dict], report: Report) -> None:
    """Compare the figures of one width with the goals."""
    ours = found["single"]
    faster = ours["tokens/s"] / found["HF Trainer"]["tokens/s"]
    report.goal(
        f"{name}: {GOAL_AGAINST_TRAINER} times the HF Trainer's tokens/s",
        faster >= GOAL_AGAINST_TRAINER,
        f"{faster:.2f}",
    )
    reached = ours["MFU"]
    report.goal(
        f"{name}: {GOAL_MFU:.0%} MFU", None if reached is None else reached >= GOAL_MFU, reached
    )
    for engine in ("zero3", "fsdp"):
        share = found[engine]["tokens/s"] / ours["tokens/s"]
        report.goal(
            f"{name}: {engine} within 15 % of single",
            share >= GOAL_AGAINST_SINGLE,
            f"{share:.2f} of its tokens/s",
        )
