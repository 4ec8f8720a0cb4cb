"""Where the time of a training step goes: a trace of a few steps and the operations that cost most."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity

from launch.runtime.distributed import say
from launch.runtime.files import write_text
from launch.training.loop import Metrics

WARM_UP, STEPS, OPERATIONS = 2, 3, 10
TRACE, TABLE = "profile/trace.json", "profile/operations.txt"  # in the run folder


def profiled(metrics: Iterator[Metrics], left: int, folder: Path, rank: int) -> Iterator[Metrics]:
    """`metrics` as they come, with rank 0's steps after the first few recorded; the other ranks run as ever.

    Writes TRACE (Chrome's JSON: chrome://tracing, ui.perfetto.dev) and TABLE. `left`: steps that there will be.
    """
    skipped = min(
        WARM_UP, left - 2
    )  # one more is recorded and thrown away: the profiler's own warm-up
    if rank != 0 or skipped < 0:
        if skipped < 0:
            say("--profile: fewer than 2 steps are left; nothing is recorded")
        yield from metrics
        return
    gpu = torch.cuda.is_available()

    def write(profiler: torch.profiler.profile) -> None:
        (folder / TRACE).parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / TRACE))
        order = "self_device_time_total" if gpu else "self_cpu_time_total"
        averages = profiler.key_averages()
        operations = EventList(  # without spans, such as a whole step
            (of for of in averages if not of.is_user_annotation), use_device="cuda" if gpu else None
        )
        write_text(folder / TABLE, operations.table(sort_by=order, row_limit=OPERATIONS) + "\n")
        print(
            f"profile of {recorded} steps: {folder / TRACE}, and by operation: {folder / TABLE}",
            flush=True,
        )

    recorded = min(STEPS, left - skipped - 1)
    schedule = torch.profiler.schedule(
        skip_first=skipped, wait=0, warmup=1, active=recorded, repeat=1
    )
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with torch.profiler.profile(
        activities=activities, schedule=schedule, on_trace_ready=write
    ) as profiler:
        for step in metrics:
            yield step
            profiler.step()
