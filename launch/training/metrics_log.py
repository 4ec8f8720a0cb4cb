"""metrics.jsonl: every training step, written and shown as it comes."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from launch.run.metrics import METRICS, Metrics
from launch.run.progress import Progress
from launch.runtime.distributed import run_on_rank0
from launch.runtime.files import write_text


def log_steps(
    metrics: Iterable[Metrics],
    done: Sequence[Metrics],
    total: int,
    folder: Path,
    rank: int,
    log: Callable[[Metrics], None] = lambda _: None,
    unit: str = "answer tokens",
) -> Iterator[Metrics]:
    """Yield the steps of a training; rank 0 writes each to metrics.jsonl and shows it. Collective.

    Ranks meet only ten times a run: what rank 0 could not write becomes an error on every rank
    then.

    Args:
        done: the steps of earlier starts, which stand first in the file.
        total: steps of the whole run.
        log: what rank 0 also calls with each step.
        unit: of what the loss counts.

    Raises:
        UserError: the file cannot be written.
    """
    every = max(1, total // 10)
    path = folder / METRICS
    run_on_rank0(lambda: write_text(path, "".join(json.dumps(step) + "\n" for step in done)))
    failures: list[OSError] = []

    def raise_failure() -> None:
        if failures:
            raise failures[0]

    with Progress("train", total, rank, "steps", done=len(done)) as progress:
        for step in metrics:
            if rank == 0:
                try:
                    with path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(step) + "\n")
                    log(step)
                except OSError as error:
                    failures.append(error)
            progress.advance(text=_describe_step(step, unit))
            if step["step"] % every == 0:
                run_on_rank0(raise_failure)
            yield step
        run_on_rank0(raise_failure)  # of the last steps, wherever the training has ended


def _describe_step(step: Metrics, unit: str) -> str:
    """Describe what a step gave, for the line that shows the progress."""
    return (
        f"loss {step['loss']:.4f} grad_norm {step['grad_norm']:.3f} lr {step['lr']:.2e}, "
        f"{format_speed(step, unit)}"
    )


def format_speed(step: Metrics, unit: str = "answer tokens") -> str:
    """Format what a step made of each device."""
    flops = ""
    if step["tflops"] is not None:
        flops = f"{step['tflops']:.3g} TFLOP/s"
        if step["utilisation"]:
            peak = step["tflops"] / step["utilisation"]
            flops += f" ({step['utilisation']:.0%} of the device's {peak:.4g})"
        flops += ", "
    return (
        f"{step['tokens_per_second']:.0f} {unit}/s and "
        f"{step['all_tokens_per_second']:.0f} {'tokens/s' if unit == 'rows' else 'in all'} a device, {flops}"
        f"{step['peak_memory_gib']:.3g} GiB, data wait {step['data_wait']:.2f} s"
    )
