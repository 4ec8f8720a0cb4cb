"""Host time of a micro batch, by engine: the CPU time that Python and the libraries take, whatever the device does.

    python bench/host.py

A GPU is idle while its host prepares the next kernel. This measures, on CPUs, the process time of a forward and
backward pass of a Llama of 32 layers so narrow (64) that arithmetic hardly counts, with LoRA on all seven kinds of
linear layers, gradient checkpointing and a bf16 base, on 2 ranks. Process time does not count what other processes
take, so the machine need not be idle. Each figure is the median over the steps of a rank after the first, of the
slower rank. Ends with 1 where a goal is missed:

    zero3 takes at most fsdp's time, and fsdp at most 1.5 times zero2's
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the host is measured, whatever else there is

ENGINES = ("zero2", "fsdp", "zero3")
RANKS, RANK, LENGTH, MICRO_BATCHES, VOCABULARY = 2, 8, 64, 4, 256
GOALS = (("zero3", "fsdp", 1.0), ("fsdp", "zero2", 1.5))  # (engine, at most this one's, times)


def write_base(folder: Path, layers: int) -> None:
    """Write a random Llama so narrow that its arithmetic hardly counts."""
    import torch

    from bench.gpu_parts.common import Shape, make_base

    shape = Shape(layers, width=64, inner=128, heads=4, kv_heads=4)
    make_base(folder, shape, VOCABULARY, torch.bfloat16, torch.device("cpu"))


def measure_engine(folder: Path, engine: str, steps: int) -> None:
    """Train on one rank, and write the seconds of a micro batch to `folder`. Runs under a launcher."""
    import torch
    import torch.distributed as dist

    from bench.gpu_parts.common import make_tokens, start_training
    from launch.config.schema import Train
    from launch.runtime.distributed import start_process_group, stop_process_group
    from launch.training import loop

    device = start_process_group()
    examples = RANKS * MICRO_BATCHES
    settings = Train(global_batch=examples, micro_batch=1, checkpoint_every=1)
    tokens = make_tokens(examples, LENGTH, VOCABULARY)
    plan = [list(range(examples))] * (steps + 1)
    seconds, losses = [], []
    started = start_training(engine, folder, device, torch.bfloat16, RANK, settings, True)
    with started as (_, state):
        before = time.process_time()
        for metrics in loop.train(state, tokens, plan, settings, device):
            now = time.process_time()
            seconds.append((now - before) / MICRO_BATCHES)
            losses.append(metrics["loss"])
            before = now
    found = [None] * RANKS
    dist.all_gather_object(found, statistics.median(seconds[1:]))
    if dist.get_rank() == 0:
        record = {"milliseconds": round(1000 * max(found), 1), "losses": losses}
        (folder / f"{engine}.json").write_text(json.dumps(record))
    stop_process_group()


def run_engine(folder: Path, engine: str, steps: int) -> dict:
    """Launch the ranks of one engine and return what they measured."""
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    line = [torchrun, "--standalone", "--nproc_per_node", str(RANKS), __file__]
    line += ["--engine", engine, "--folder", str(folder), "--steps", str(steps)]
    subprocess.run(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    return json.loads((folder / f"{engine}.json").read_text())


def find_missed_goals(milliseconds: dict[str, float]) -> list[str]:
    """Return a line for each goal that is missed."""
    missed = []
    for engine, other, factor in GOALS:
        ratio = milliseconds[engine] / milliseconds[other]
        if ratio > factor:
            missed.append(f"{engine} takes {ratio:.2f} times {other}'s time; goal {factor:g}")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6, help="steps measured (default %(default)s)")
    parser.add_argument("--layers", type=int, default=32, help="default %(default)s")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "host.json")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        measure_engine(arguments.folder, arguments.engine, arguments.steps)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_base(folder, arguments.layers)
        found = {engine: run_engine(folder, engine, arguments.steps) for engine in ENGINES}
    milliseconds = {engine: record["milliseconds"] for engine, record in found.items()}
    for engine, value in milliseconds.items():
        print(f"{engine}: {value} ms of host time a micro batch, losses {found[engine]['losses']}")
    record = {"layers": arguments.layers, "ranks": RANKS, "milliseconds": milliseconds}
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    missed = find_missed_goals(milliseconds)
    for line in missed:
        print(f"missed: {line}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
