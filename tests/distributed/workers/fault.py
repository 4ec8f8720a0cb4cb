"""launch/train.py, or calibrate.py, with one fault planted: `fault.py POINT <arguments of the command>`.

Real faults of real processes: the rank kills itself with SIGKILL, or hangs, at a point that a killer outside could
only hit by luck.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import astra.calibrate
from launch import calibrate, pipeline, train
from launch.calibration import store as artifact
from launch.run import folder as run_folder
from launch.runtime import watchdog as watch
from launch.runtime.errors import run
from launch.training import checkpoint, export, loop


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(3600)


def wait_to_be_asked() -> None:
    while not watch.stopping():
        time.sleep(0.01)


def plant(module: object, name: str, rank: int, call: int, fault: Callable[[], None]) -> None:
    """On `rank`, call number `call` (from 1) of `module.name` meets the fault instead."""
    original, calls = getattr(module, name), [0]

    def planted(*arguments: object, **keywords: object) -> object:
        calls[0] += 1
        if calls[0] == call and int(os.environ["RANK"]) == rank:
            fault()
        return original(*arguments, **keywords)

    setattr(module, name, planted)


LAST = int(os.environ.get("WORLD_SIZE", "1")) - 1  # rank
POINTS = {
    "none": lambda: None,  # the fault comes from outside; the wait for it is short all the same
    "calibration": lambda: plant(astra.calibrate, "forward", 1, 2, die),
    "write": lambda: plant(
        checkpoint, "write_json", 0, 3, die
    ),  # tensors written, manifest not: the third checkpoint
    "export": lambda: plant(export, "write_json", 0, 2, die),  # after the first adapter
    "window": lambda: plant(
        artifact, "save_window", 0, 2, die
    ),  # of calibrate.py: one window is there
    "asked": lambda: plant(
        loop, "learning_rate", LAST, 5, wait_to_be_asked
    ),  # step 5 lasts until a signal comes
    "stall": lambda: plant(loop, "collate", 1, 9, hang),
}

if __name__ == "__main__":
    assert pipeline  # imported before the fault is planted
    point = next(argument for argument in sys.argv if argument in POINTS)
    sys.argv.remove(point)
    POINTS[point]()
    watch.SILENCE, run_folder.WAIT = 8.0, 3.0
    run((calibrate if point == "window" else train).main)
