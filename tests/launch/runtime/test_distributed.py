"""What one rank finds wrong, every rank is told; and which rank and node a launcher's variables say.

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
from launch.runtime import distributed
from launch.runtime.distributed import (
    choose_node_owners,
    complete_environment,
    run_on_each_node,
    run_on_rank0,
)
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


ONLY = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
SECOND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
TASK = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, ONLY),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, ONLY),
        (SECOND, SECOND | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}),  # Kubeflow's PyTorchJob
        (
            SECOND | {"LOCAL_RANK": "1", "LOCAL_SIZE": "2"},
            {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        ),
        # One torchrun on each machine, started by mpirun.
        (
            SECOND | {"LOCAL_WORLD_SIZE": "2", "PMI_SIZE": "4"},
            {"RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        ),
        (TASK | {"PMI_SIZE": "2", "PMIX_RANK": "1"}, {"RANK": "1", "LOCAL_WORLD_SIZE": "2"}),
    ],
)
def test_what_a_launcher_does_not_say_of_a_rank_is_added(
    given: dict[str, str], wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed.os, "environ", dict(given))
    complete_environment()
    assert os.environ.items() >= wanted.items()


@pytest.mark.parametrize("name", distributed.MPI_SIZES)
@pytest.mark.parametrize("task", [{}, TASK], ids=["machine", "Slurm"])
def test_processes_of_mpirun_are_refused(
    name: str, task: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a job of Slurm mpirun starts a task on each node, whose variables all its processes have."""
    monkeypatch.setattr(distributed.os, "environ", task | {name: "16"})
    with pytest.raises(
        UserError, match=f"^{name}: mpirun has started 16 .* torchrun, srun, or deepsp"
    ):
        complete_environment()


@pytest.mark.parametrize(
    ("places", "owners"),
    [
        ("a0 a1 b0 b1", [0, 0, 2, 2]),
        ("a0 b0 a1 b1", [0, 1, 0, 1]),  # Slurm's cyclic placement
        ("a0 a1 a0 a1", [0, 0, 2, 2]),  # containers of one name
        # deepspeed with 2 slots on a and 4 on b: local ranks are global ones modulo 2, and modulo 4
        ("a0 a1 b2 b3 b0 b1", [0, 0, 4, 4, 4, 4]),
        ("a1 a2", [0, 1]),  # no local rank 0
    ],
)
def test_a_nodes_first_rank_owns_it(places: str, owners: list[int]) -> None:
    assert choose_node_owners([(name[0], int(name[1])) for name in places.split()]) == owners
