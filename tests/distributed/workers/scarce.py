"""launch/calibrate.py with as much free memory as is said: `scarce.py MIB,MIB,... POINT <arguments>`.

The numbers are the free memory of each rank, in MiB. With the POINT `killed` rank 0 kills itself
with SIGKILL before it saves the second window; `whole` runs undisturbed.
"""

import os
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

from launch import calibrate
from launch.calibration import run as calibration
from launch.planning import budget
from launch.runtime.entry import run_command


def kill_in_second_window() -> None:
    """Let rank 0 die when it is to save the second window."""
    save_window = calibration.save_window

    def save_or_die(folder: Path, number: int, solutions: dict, seconds: float) -> None:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        save_window(folder, number, solutions, seconds)

    calibration.save_window = save_or_die


if __name__ == "__main__":
    sizes, point = sys.argv[1:3]
    del sys.argv[1:3]
    free = float(sizes.split(",")[int(os.environ.get("RANK", "0"))]) * 2**20
    budget.measure_free_memory = lambda _: int(free)
    if point == "killed":
        kill_in_second_window()
    run_command(calibrate.main)
