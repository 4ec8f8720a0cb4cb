"""Every method calibrates, trains three steps and exports."""

import gc
import math

from bench.gpu_parts.common import read_losses, write_recipe
from bench.gpu_parts.report import Report, Work
from launch import pipeline
from launch.config.loading import read_recipe
from launch.methods.registry import METHODS
from launch.runtime.distributed import start_process_group, stop_process_group


def measure(work: Work, report: Report) -> None:
    """Run the stages of a run for each method, in one process."""
    device = start_process_group()
    path = write_recipe(work)
    for method in METHODS:
        folder = work.folder / f"method-{method}"
        folder.mkdir()
        recipe = read_recipe(str(path), [f"adapter.method={method}"])
        pipeline.run_stages(recipe, method, folder, device)
        losses = read_losses(folder)
        report.check(
            f"{method} calibrates, trains and exports",
            len(losses) == 3 and all(map(math.isfinite, losses)),
            [round(loss, 4) for loss in losses],
        )
        gc.collect()
    stop_process_group()
