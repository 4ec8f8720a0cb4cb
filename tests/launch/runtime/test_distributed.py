"""What one rank finds wrong, and every rank is told."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from safetensors.torch import save_file

from astra import adapter
from astra.adapter import Factors
from launch.runtime.distributed import _one_thread, on_each_node, on_rank0
from launch.runtime.errors import RankError, UserError


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files cannot grow beyond 1 MB, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("on", [on_rank0, on_each_node])
@pytest.mark.parametrize(
    "write",
    [
        lambda folder: save_file({"a": torch.ones(10**6)}, folder / "a.safetensors"),
        lambda folder: adapter.save(
            folder, LoraConfig(r=2), "base", {"q": Factors(torch.ones(2, 10**6), torch.ones(1, 2))}
        ),
        lambda folder: (folder / "a.bin").write_bytes(bytes(10**7)),
    ],
    ids=["safetensors", "adapter", "bytes"],
)
def test_a_full_disk_is_a_user_error(
    on: Callable,
    write: Callable,
    small_files: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=os.strerror(errno.EFBIG)):
        on(lambda: write(tmp_path))


def test_a_network_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,wire7")
    monkeypatch.setattr(dist.ProcessGroupGloo, "__init__", _one_thread)
    with pytest.raises(
        RankError, match=r"rank 0: GLOO_SOCKET_IFNAME: .* has no network lo,wire7 with an address"
    ):
        dist.ProcessGroupGloo(dist.HashStore(), 0, 1)
