"""launch.runtime.memory: what the machine, a cgroup and the other ranks leave to this rank.

Simulated: the files of cgroups, in a temporary folder; the GPU's numbers; and the other ranks.
"""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist

from launch.runtime import memory
from launch.runtime.memory import measure_free_memory, read_free_main_memory

MACHINE = 1000
UNLIMITED = 2**63 - 4096  # what version 1 has where there is no limit


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=MACHINE))
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    return tmp_path


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_without_cgroups_it_is_what_the_machine_has(cgroups: Path) -> None:
    assert read_free_main_memory() == MACHINE
    (cgroups / "own").write_text("0::/\n")  # the root of version 2 has no files
    assert read_free_main_memory() == MACHINE


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory__max": 500, "memory__current": 200}, 300),
        ({"memory__max": 500, "memory__current": 200, "memory__stat": "inactive_file 50"}, 350),
        ({"memory__max": "max", "memory__current": 200}, MACHINE),
        ({"memory__max": "max", "memory__high": 400, "memory__current": 200}, 200),
        ({"memory__max": 5000, "memory__current": 200}, MACHINE),
        ({"memory__max": 500, "memory__current": 600}, 0),
    ],
)
def test_a_limit_of_version_2_counts(files: dict, free: int, cgroups: Path) -> None:
    (cgroups / "own").write_text("0::/job/step/task\n")
    write(cgroups / "cgroup" / "job" / "step" / "task", memory__max="max", memory__current=100)
    write(cgroups / "cgroup" / "job", **files)  # Slurm's limit is on the job
    assert read_free_main_memory() == free


def test_a_limit_of_version_1_counts(cgroups: Path) -> None:
    (cgroups / "own").write_text("7:cpu:/x\n5:memory,foo:/docker/abc\n0::/\n")
    folder = cgroups / "cgroup" / "memory"
    write(folder, memory__limit_in_bytes=UNLIMITED, memory__usage_in_bytes=900)
    assert read_free_main_memory() == MACHINE
    write(
        folder / "docker" / "abc",
        memory__limit_in_bytes=300,
        memory__usage_in_bytes=120,
        memory__stat="cache 1\ninactive_file 7\ntotal_inactive_file 20",
    )
    assert read_free_main_memory() == 200


def test_in_a_container_whose_path_only_the_host_has_the_root_counts(cgroups: Path) -> None:
    (cgroups / "own").write_text("0::/../../kubepods/pod1\n")
    write(cgroups / "cgroup", memory__max=600, memory__current=100)
    assert read_free_main_memory() == 500


def gather(places: list) -> object:
    """Return a gather whose other ranks are at `places`."""

    def all_gather(found: list, own: object) -> None:
        found[:] = [own if place == "here" else place for place in places]

    return all_gather


@pytest.mark.parametrize(
    ("places", "share"), [(["here"], 1), (["here", "here", ("other host", "")], 2)]
)
def test_ranks_of_a_host_share_its_memory(
    places: list, share: int, cgroups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: len(places))
    monkeypatch.setattr(dist, "all_gather_object", gather(places))
    assert measure_free_memory(torch.device("cpu")) == MACHINE // share


def test_a_gpus_memory_is_what_the_driver_has_and_what_torch_keeps_unused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (700, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 90)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 40)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-1")
    )
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather(["here", ("host", "GPU-2")]))
    assert measure_free_memory(device) == 750
