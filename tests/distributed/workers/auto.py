"""launch/train.py with as much free memory as is said: `auto.py BYTES,BYTES,... <arguments>`."""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

from launch import train
from launch.planning import decisions
from launch.runtime.entry import run_command

if __name__ == "__main__":
    sizes = sys.argv.pop(1)
    free = int(float(sizes.split(",")[int(os.environ.get("RANK", "0"))]))
    decisions.measure_free_memory = lambda _: free
    run_command(train.main)
