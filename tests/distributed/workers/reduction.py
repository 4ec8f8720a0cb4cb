"""One rank that adds up sums with others: `reduction.py OUTPUT`.

Writes to OUTPUT/rankI.safetensors the sums after each way of adding them up, and to
OUTPUT/rankI.json what was sent and what is said of sums that were spoilt on the way.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[3])

import pytest
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from astra.errors import AstraError
from astra.moments import Group
from astra.reduction import check_sums_agree, reduce_sums
from launch.runtime.distributed import start_process_group, stop_process_group
from launch.runtime.entry import run_command
from tests.support.reduction import SIZES, SMALL_BUCKET, make_sums, name_tensors
from tests.support.worker import read_arguments

OPTIONS = {
    "all": {},
    "small": {"bucket_bytes": SMALL_BUCKET},
    "owner": {"reduction": "owner"},
}


def record_sent(call: Callable, sent: list[list]) -> Callable:
    """Return a collective that also adds the dtype and the bytes of its tensor to `sent`."""

    def record(tensor: Tensor, *others: Any, **named: Any) -> Any:
        sent.append([str(tensor.dtype), tensor.nbytes])
        return call(tensor, *others, **named)

    return record


def add_up(kind: str, owners: list[int], sent: list[list]) -> dict[str, Tensor]:
    """Return this rank's sums after one way of adding them up; with "owner" those it owns."""
    sums = make_sums(dist.get_rank())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "reduce"):
            patch.setattr(dist, name, record_sent(getattr(dist, name), sent))
        reduce_sums(sums, owners, **OPTIONS[kind])
    tensors = name_tensors(kind, sums)
    if kind != "owner":
        return tensors
    return {k: v for k, v in tensors.items() if owners[int(k.split(".")[1])] == dist.get_rank()}


def spoil(owners: list[int]) -> list[str]:
    """Return what is said of sums of which rank 1 has a wrong number, and one that is not finite."""
    groups = [Group((f"module{i}",), "input", 0) for i in range(len(owners))]
    sums, said = make_sums(dist.get_rank()), []
    reduce_sums(sums, owners)
    check_sums_agree(sums, groups)
    for value in (3.0, float("nan")):
        if dist.get_rank() == 1:
            sums[2].blocks[1][4, 5] = value
        try:
            check_sums_agree(sums, groups)
        except AstraError as error:
            said.append(str(error))
    for group_sums in sums:  # not finite on every rank: left to the solver
        group_sums.tensors()[0].fill_(float("nan"))
    check_sums_agree(sums, groups)
    return said


def main(output: Path) -> None:
    """Add up sums in every way, and spoil some."""
    start_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    owners = [i % world_size for i in range(len(SIZES) + 1)]
    tensors: dict[str, Tensor] = {}
    sent: dict[str, list] = {kind: [] for kind in OPTIONS}
    for kind in OPTIONS:
        tensors |= add_up(kind, owners, sent[kind])
    save_file(tensors, output / f"rank{rank}.safetensors")
    told = {"sent": sent, "said": spoil(owners)}
    (output / f"rank{rank}.json").write_text(json.dumps(told))
    stop_process_group()


if __name__ == "__main__":
    run_command(lambda: main(Path(read_arguments()[0])))
