"""What one rank finds wrong, every rank is told.

Needs nothing: one process is the whole group. Takes 3 s.
"""

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
from astra.errors import AstraError
from launch.runtime.distributed import run_on_each_node, run_on_rank0
from launch.runtime.errors import UserError


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


@pytest.mark.parametrize("run_on", [run_on_rank0, run_on_each_node])
@pytest.mark.parametrize(
    "write",
    [
        lambda folder: save_file({"a": torch.ones(10**6)}, folder / "a.safetensors"),
        lambda folder: adapter.save_adapter(
            folder, LoraConfig(r=2), "base", {"q": Factors(torch.ones(2, 10**6), torch.ones(1, 2))}
        ),
        lambda folder: (folder / "a.bin").write_bytes(bytes(10**7)),
    ],
    ids=["safetensors", "adapter", "bytes"],
)
def test_a_full_disk_is_a_user_error(
    run_on: Callable,
    write: Callable,
    small_files: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=os.strerror(errno.EFBIG)):
        run_on(lambda: write(tmp_path))


def test_an_error_of_the_method_names_the_field() -> None:
    def refuse() -> None:
        raise AstraError("8 is above the 4 outputs of q; lower it", "rank")

    with pytest.raises(UserError, match=r"^adapter\.rank: 8 is above the 4 outputs of q"):
        run_on_rank0(refuse)
