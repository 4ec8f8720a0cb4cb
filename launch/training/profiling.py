"""Where the time of a training step goes: a trace of a few steps, and the costliest operations."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity

from launch.run.metrics import Metrics
from launch.runtime.distributed import print_rank0
from launch.runtime.files import write_text

NUM_WARM_UP = 2  # steps that are not recorded at first
NUM_RECORDED = 3  # steps
NUM_OPERATIONS = 10  # rows of the table
TRACE, TABLE = "profile/trace.json", "profile/operations.txt"  # in the run folder


def profile_steps(
    metrics: Iterator[Metrics], num_steps: int, folder: Path, rank: int
) -> Iterator[Metrics]:
    """Yield `metrics` as they come, while rank 0 records the steps after the first few.

    Writes TRACE (Chrome's JSON, for chrome://tracing or ui.perfetto.dev) and TABLE.

    Args:
        num_steps: steps that `metrics` will have.
    """
    # The profiler's own warm-up takes one more step, which it records and throws away.
    num_skipped = min(NUM_WARM_UP, num_steps - 2)
    if num_skipped < 0:
        print_rank0("--profile: fewer than 2 steps are left; nothing is recorded")
    if rank != 0 or num_skipped < 0:
        yield from metrics
        return
    num_recorded = min(NUM_RECORDED, num_steps - num_skipped - 1)
    has_gpu = torch.cuda.is_available()

    def write(profiler: torch.profiler.profile) -> None:
        (folder / TRACE).parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / TRACE))
        write_text(folder / TABLE, _render_operations(profiler, has_gpu))
        print(
            f"profile of {num_recorded} steps: {folder / TRACE}, and by operation: "
            f"{folder / TABLE}",
            flush=True,
        )

    activities = [ProfilerActivity.CPU]
    if has_gpu:
        activities.append(ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(
        skip_first=num_skipped, wait=0, warmup=1, active=num_recorded, repeat=1
    )
    with torch.profiler.profile(
        activities=activities, schedule=schedule, on_trace_ready=write
    ) as profiler:
        for step in metrics:
            yield step
            profiler.step()


def _render_operations(profiler: torch.profiler.profile, has_gpu: bool) -> str:
    """Render a table of the operations that took most time by themselves."""
    # Without spans, such as a whole step, which would be the costliest "operations".
    events = [event for event in profiler.key_averages() if not event.is_user_annotation]
    operations = EventList(events, use_device="cuda" if has_gpu else None)
    order = "self_device_time_total" if has_gpu else "self_cpu_time_total"
    return operations.table(sort_by=order, row_limit=NUM_OPERATIONS) + "\n"
