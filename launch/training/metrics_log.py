"""What a run leaves to look at: metrics.jsonl, plots, progress, and the conditions its numbers were made under."""

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from launch.runtime import watchdog as watch
from launch.runtime.distributed import on_rank0
from launch.runtime.files import write_text
from launch.training.loop import Metrics

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ["torch", "transformers", "deepspeed", "peft", "datasets", "tokenizers"]


def progress(items: Iterable, total: int, description: str, rank: int) -> Iterator:
    """`items` with a progress bar on rank 0; ten plain lines where the output is not a terminal."""
    every = max(1, total // 10)
    terminal = sys.stderr.isatty()
    bar = tqdm(items, total=total, desc=description, disable=rank != 0 or not terminal)
    for done, item in enumerate(bar, start=1):
        watch.mark(f"{description} {done}/{total}")
        yield item
        if rank == 0 and not terminal and (done % every == 0 or done == total):
            print(f"{description}: {done}/{total}", flush=True)


def progress_of(
    parts: Iterable[dict],
    done: int,
    total: int,
    description: str,
    rank: int,
    note: Callable[[], str],
) -> Iterator[dict]:
    """`parts`, whose lengths add up to `total` with the `done` of earlier starts; `note` is shown beside the bar."""
    terminal, shown = sys.stderr.isatty(), 10 * done // max(1, total)
    with tqdm(
        total=total, initial=done, desc=description, disable=rank != 0 or not terminal
    ) as bar:
        for part in parts:
            yield part
            done += len(part)
            watch.mark(f"{description} {done}/{total}")
            bar.update(len(part))
            bar.set_postfix_str(note())
            if rank == 0 and not terminal and 10 * done // total > shown:
                shown = 10 * done // total
                print(f"{description}: {done}/{total} {note()}".rstrip(), flush=True)


def track(
    metrics: Iterable[Metrics],
    done: list[Metrics],
    total: int,
    folder: Path,
    rank: int,
    log: Callable[[Metrics], None] = lambda _: None,
) -> Iterator[Metrics]:
    """The steps of a training as they come; rank 0 writes each to metrics.jsonl and shows progress. Collective.

    Ranks meet only ten times a run: what rank 0 could not write is an error on every rank then.

    Args:
        done: the steps of earlier starts, which come first in the file.
        total: steps of the whole run.
        log: where rank 0 also puts each step.
    """
    terminal = sys.stderr.isatty()
    every = max(1, total // 10)
    path = folder / "metrics.jsonl"
    on_rank0(lambda: write_text(path, "".join(json.dumps(step) + "\n" for step in done)))
    bar = tqdm(total=total, initial=len(done), desc="train", disable=rank != 0 or not terminal)
    failures: list[OSError] = []

    def write(step: Metrics) -> None:
        try:
            with path.open("a") as file:
                file.write(json.dumps(step) + "\n")
            log(step)
        except OSError as error:
            failures.append(error)
        bar.update()
        bar.set_postfix_str(f"loss {step['loss']:.4f}, {speed(step)}")
        if not terminal and (step["step"] % every == 0 or step["step"] in (1, total)):
            print(
                f"train: {step['step']}/{total} loss {step['loss']:.4f} grad_norm {step['grad_norm']:.3f} "
                f"lr {step['lr']:.2e}, {speed(step)}, {timedelta(seconds=round(step['seconds_left']))} left",
                flush=True,
            )

    def check() -> None:
        if failures:
            raise failures[0]

    with bar:
        for step in metrics:
            if rank == 0:
                write(step)
            if step["step"] % every == 0 or step["step"] == total:
                on_rank0(check)
            yield step


def speed(step: Metrics) -> str:
    """What a step made of each device, in a few words."""
    share = ""
    if step["utilisation"]:
        share = f" ({step['utilisation']:.0%} of the device's {step['tflops'] / step['utilisation']:.4g})"
    flops = f"{step['tflops']:.3g} TFLOP/s{share}, " if step["tflops"] is not None else ""
    return (
        f"{step['tokens_per_second']:.0f} answer tokens/s and {step['all_tokens_per_second']:.0f} in all a device, "
        f"{flops}{step['peak_memory_gib']:.3g} GiB, data wait {step['data_wait']:.2f} s"
    )


def conditions(world_size: int, device: torch.device) -> dict:
    """Versions, revision and machine that a run's numbers hold for."""
    return {
        "git_revision": git_revision(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "world_size": world_size,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu ({platform.machine()})",
        "threads_per_rank": torch.get_num_threads(),
    }


def read_metrics(folder: Path) -> list[Metrics]:
    """The steps in a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def git_revision() -> str | None:
    """The repository's commit, with `-dirty` where files differ from it; None outside a git checkout."""
    command = [
        "git",
        "-C",
        str(REPOSITORY),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
