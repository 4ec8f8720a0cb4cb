"""launch/evaluate.py with every rank as a node of its own: `node.py CACHES <its arguments>`.

Rank I has the hub's cache CACHES/I and no other, and starts in that folder.
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

from huggingface_hub import constants

from launch import evaluate
from launch.runtime.entry import run_command

if __name__ == "__main__":
    caches, rank = sys.argv.pop(1), os.environ["RANK"]
    constants.HF_HUB_CACHE = f"{caches}/{rank}"
    os.chdir(constants.HF_HUB_CACHE)
    os.environ["LOCAL_RANK"] = "0"
    run_command(evaluate.main)
