"""One rank of many gathers at once, in the default group and in a second one: `gloo.py OUTPUT`.

Rank 0 writes the groups' numbers of threads to the file OUTPUT. With two threads a group, torch
2.13 corrupts its heap here within seconds (launch/runtime/compat/torch_parts.py).
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_gather_single

from launch.runtime import distributed
from launch.runtime.entry import run_command


def main() -> None:
    """Gather 16,000 times, check every result, and write the numbers of threads."""
    distributed.start_process_group()
    groups = [dist.group.WORLD, dist.new_group()]
    rank = torch.full((3,), float(dist.get_rank()))
    whole = torch.arange(float(dist.get_world_size())).repeat_interleave(3)
    for group in groups:
        for _ in range(500):
            gathers = [all_gather_single(rank, 0, group) for _ in range(16)]
            assert all(torch.equal(gather + 0, whole) for gather in gathers)
    if dist.get_rank() == 0:
        threads = [group._get_backend(torch.device("cpu")).options._threads for group in groups]
        Path(sys.argv[1]).write_text(json.dumps(threads))
    distributed.stop_process_group()


if __name__ == "__main__":
    run_command(main)
