"""launch/train.py, or calibrate.py, with one fault planted: `fault.py POINT <its arguments>`.

The faults are real: a rank kills itself with SIGKILL, or hangs, at a point that a signal from
outside could hit only by luck.
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch

import astra.calibrate
from launch import calibrate, pipeline, train
from launch.calibration import run as calibration
from launch.runtime import locks, watchdog
from launch.runtime.entry import run_command
from launch.runtime.errors import UserError
from launch.runtime.peers import Limits
from launch.stages import export as stage_export
from launch.stages import prepare
from launch.stages import results as stage_results
from launch.training import checkpoint, export, loop

LAST_RANK = int(os.environ.get("WORLD_SIZE", "1")) - 1


def die() -> None:
    """Kill this rank."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """Make no progress for an hour."""
    time.sleep(3600)


def fill_memory() -> None:
    """Ask for more memory than there is."""
    torch.empty(2**50)


def break_down() -> None:
    """Fail as a mistake in the code does."""
    raise KeyError("exp_avg")


def refuse() -> None:
    """Fail as a check does that only this rank does not pass."""
    raise UserError("tracking: not on this node")


def fail_in_a_library() -> None:
    """Fail as torch and transformers do, with the type that a lost rank's collectives raise too."""
    raise RuntimeError("no reverse of this conversion")


def fill_disk() -> None:
    """Fail as a write to a full disk does, with the file's name."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "tensors.safetensors")


def wait_for_signal() -> None:
    """Wait until a signal has asked this rank to stop."""
    while not watchdog.stop_requested():
        time.sleep(0.01)


def plant_fault(
    module: object,
    name: str,
    rank: int,
    call: int,
    fault: Callable[[], None],
    phase: str | None = None,
) -> None:
    """Make call number `call`, from 1, of `module.name` on `rank` run `fault` first.

    With `phase` only calls in that phase count: saving is tried in the first step already.
    """
    original, num_calls = getattr(module, name), 0

    def run_with_fault(*arguments: object, **keywords: object) -> object:
        nonlocal num_calls
        num_calls += phase is None or watchdog.current_phase() == phase
        if num_calls == call and int(os.environ["RANK"]) == rank:
            fault()
        return original(*arguments, **keywords)

    setattr(module, name, run_with_fault)


POINTS = {
    # No fault: it comes from outside, and only the time limits are short.
    "none": lambda: None,
    "calibration": lambda: plant_fault(astra.calibrate, "run_forward", 1, 2, die),
    # The third checkpoint, that of step 6, has its tensors but no manifest.
    "write": lambda: plant_fault(checkpoint, "write_json", 0, 1, die, "training step 6"),
    # A checkpoint and one of the exports are tried after the first step.
    "rehearsal": lambda: plant_fault(export, "write_json", 0, 2, die, "training step 1"),
    # The first of the adapters is exported.
    "export": lambda: plant_fault(export, "write_json", 0, 2, die, "exporting"),
    # calibrate.py has saved one window.
    "window": lambda: plant_fault(calibration, "save_window", 0, 2, die),
    # Step 5 lasts until a signal comes.
    "signal": lambda: plant_fault(loop, "compute_learning_rate", LAST_RANK, 5, wait_for_signal),
    "memory": lambda: plant_fault(loop, "collate_sequences", LAST_RANK, 9, fill_memory),
    "refusal": lambda: plant_fault(loop, "collate_sequences", LAST_RANK, 9, refuse),
    "early": lambda: plant_fault(prepare, "load_tokenizer", LAST_RANK, 1, refuse),
    "unsaveable": lambda: plant_fault(
        export, "write_json", 0, 2, fail_in_a_library, "training step 1"
    ),
    # The loss of lora_small/ is tried too.
    "small": lambda: plant_fault(stage_export, "without_products", 0, 1, break_down),
    "library": lambda: plant_fault(export, "write_json", 0, 2, fail_in_a_library, "exporting"),
    "mistake": lambda: plant_fault(loop, "collate_sequences", LAST_RANK, 9, break_down),
    "rank0": lambda: plant_fault(loop, "collate_sequences", 0, 9, break_down),
    # In the export, which rank 0 writes while the others wait.
    "disk": lambda: plant_fault(export, "write_json", 0, 2, fill_disk, "exporting"),
    "writer": lambda: plant_fault(export, "write_json", 0, 2, break_down, "exporting"),
    "plot": lambda: plant_fault(stage_export, "plot_runs", 0, 1, break_down),
    "card": lambda: plant_fault(stage_results, "render_model_card", 0, 1, break_down),
    "stall": lambda: plant_fault(loop, "collate_sequences", 1, 9, hang),
}

if __name__ == "__main__":
    assert pipeline  # imported before the fault is planted
    point = next(argument for argument in sys.argv if argument in POINTS)
    sys.argv.remove(point)
    POINTS[point]()
    watchdog.LIMITS, locks.WAIT = Limits(silence=8.0), 3.0  # seconds
    run_command((calibrate if point == "window" else train).main)
