"""Add up sums of 2 and 3 real ranks, by all-reduce and on the owners.

Proves that buckets change nothing, stay within their size and are fp64, and that sums which were
spoilt on one rank are refused on all. Spoiling is simulated: rank 1 changes one number.
A few seconds.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.paths import WORKERS
from tests.support.reduction import SMALL_BUCKET, make_sums, name_tensors


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_of_all_ranks_are_those_of_one(ranks: int, launch: Callable, tmp_path: Path) -> None:
    launch(WORKERS / "reduction.py", tmp_path, ranks=ranks)
    wanted: dict[str, torch.Tensor] = {}
    for rank in range(ranks):
        for key, value in name_tensors("all", make_sums(rank)).items():
            wanted[key] = wanted.get(key, 0) + value
    owned = set()
    first = load_file(tmp_path / "rank0.safetensors")
    for rank in range(ranks):
        saved = load_file(tmp_path / f"rank{rank}.safetensors")
        for key, value in wanted.items():
            torch.testing.assert_close(saved[key], value, rtol=1e-14, atol=1e-13, msg=key)
            small = saved[key.replace("all", "small")]
            torch.testing.assert_close(small, value, rtol=1e-14, atol=1e-13, msg=key)
            assert torch.equal(saved[key], first[key]), key
            by_owner = key.replace("all", "owner")
            if int(key.split(".")[1]) % ranks == rank:
                owned.add(key)
                torch.testing.assert_close(saved[by_owner], value, rtol=1e-14, atol=1e-13, msg=key)
                if ranks == 2:
                    assert torch.equal(saved[by_owner], saved[key]), key
        told = json.loads((tmp_path / f"rank{rank}.json").read_text())
        whole = sum(value.nbytes for value in wanted.values())
        for kind, sent in told["sent"].items():
            assert {dtype for dtype, _ in sent} == {"torch.float64"}
            assert sum(size for _, size in sent) == whole, kind
        # One bucket for each group, as all of them are below the default size.
        assert [len(told["sent"][kind]) for kind in ("all", "owner")] == [4, 4]
        small_sizes = [size for _, size in told["sent"]["small"]]
        assert max(small_sizes) <= SMALL_BUCKET
        assert len(small_sizes) <= 2 * whole / SMALL_BUCKET + 4
        assert len(told["said"]) == 2
        for line in told["said"]:
            assert line.startswith("module2: its calibration sums differ between ranks")
    assert owned == wanted.keys()
