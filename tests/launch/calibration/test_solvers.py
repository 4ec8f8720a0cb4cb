"""launch.calibration.solvers: GPUs that are slow in fp64 leave the solving to CPUs that are sooner.

Simulated: the GPUs' names, the cores and the other ranks. A few seconds.
"""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from astra.flops import count_solve_flops
from astra.moments import Group
from launch.calibration import solvers
from launch.calibration.solvers import choose_solve_device, count_own_cores, use_cores

GPU = torch.device("cuda", 0)
NAMES = {
    "fast": "NVIDIA H100 80GB HBM3",
    "slow": "Tesla T4",
    "unknown": "NVIDIA Something New",
}


def make_problem() -> tuple[list[Group], dict[str, nn.Linear], dict[str, int]]:
    """Return one layer of 7B's width."""
    with torch.device("meta"):
        linears = {name: nn.Linear(4096, 4096, bias=False) for name in "qkvo"}
    groups = [Group(("q", "k", "v"), "input", 4096), Group(("o",), "input", 4096)]
    return groups, linears, dict.fromkeys(linears, 128)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process be a rank like one other."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        dist, "all_gather_object", lambda places, own: places.__setitem__(slice(None), [own, own])
    )
    monkeypatch.setattr(solvers, "all_reduce_max", lambda value, _: value)


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize(
    ("gpu", "cores", "decomposition", "place"),
    [
        ("fast", 128, "output", "cuda"),
        ("unknown", 128, "output", "cuda"),
        ("slow", 4, "output", "cuda"),
        ("slow", 128, "output", "cpu"),
        ("slow", 128, "input", "cpu"),
        ("slow", 4, "matrix", "cuda"),
    ],
)
def test_cpus_solve_where_they_are_sooner(
    gpu: str, cores: int, decomposition: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: NAMES[gpu])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    device, line = choose_solve_device(GPU, *make_problem(), decomposition)
    assert device.type == place
    assert (line is not None) == (place == "cpu")
    if line:
        assert "on 64 cores a rank; Tesla T4 is slow in fp64" in line  # two ranks of one host


@pytest.mark.usefixtures("ranks")
def test_one_rank_that_is_sooner_on_its_gpu_keeps_all_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: NAMES["slow"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)))
    monkeypatch.setattr(solvers, "all_reduce_max", lambda value, _: max(value, 1.0))
    assert choose_solve_device(GPU, *make_problem(), "output") == (GPU, None)


def test_on_cpus_nothing_is_chosen() -> None:
    device = torch.device("cpu")
    assert choose_solve_device(device, *make_problem(), "output") == (device, None)


def test_cores_are_shared_by_ranks_that_have_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)

    def gather(places: list, own: tuple) -> None:
        places[:] = [own, (own[0], [4, 5, 6, 7]), own]  # srun has bound the second to others

    monkeypatch.setattr(dist, "all_gather_object", gather)
    assert count_own_cores() == 2


def test_threads_are_as_before_after_solving() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="x"), use_cores(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ValueError("x")
    assert torch.get_num_threads() == before


def test_all_vectors_are_counted_on_gpus() -> None:
    groups, linears, lora_ranks = make_problem()
    on_cpu, on_gpu = (
        count_solve_flops(groups[1], linears, lora_ranks, "input", kind) for kind in ("cpu", "cuda")
    )
    size, rank = 4096, 128
    checks = 2 * size**2 * rank
    assert on_cpu == 4 * size**3 // 3 + 2 * size**2 * rank + checks
    assert on_gpu == pytest.approx(14 / 3 * size**3 + checks)
