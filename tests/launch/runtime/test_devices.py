"""Each rank gets a GPU of its own, or a line that says why it has none.

Simulated, on CPUs: torch's counts and names of GPUs, the driver's files, and the ranks, which are
threads around one store. Takes 3 s.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch.runtime import devices, distributed
from launch.runtime.compat.deepspeed_parts import deepspeed_device
from launch.runtime.devices import can_run, choose_device, require_own_gpu
from launch.runtime.errors import RankError, UserError


@pytest.fixture
def kernels() -> list[bool]:
    """Whether cuDNN's attention has been switched on or off, as often as that was done."""
    return []


@pytest.fixture
def set_gpus(monkeypatch: pytest.MonkeyPatch, kernels: list[bool]) -> Callable[[int], list]:
    """Return a function that simulates a number of visible GPUs; it returns which ones are set."""

    def set_count(count: int) -> list:
        kernels.clear()
        chosen: list = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA TITAN")
        monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", kernels.append)
        monkeypatch.setenv("LOCAL_RANK", "0")
        return chosen

    return set_count


@pytest.mark.parametrize(("local_rank", "count", "index"), [(3, 8, 3), (3, 1, 0), (0, 1, 0)])
def test_a_rank_that_sees_one_gpu_takes_it(
    local_rank: int,
    count: int,
    index: int,
    set_gpus: Callable[[int], list],
    kernels: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = set_gpus(count)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert choose_device() == torch.device("cuda", index)
    assert chosen == [torch.device("cuda", index)]
    assert kernels == [False]


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (["sm_75", "sm_80", "sm_90"], (8, 0), True),
        (["sm_75", "sm_80", "sm_90"], (8, 9), True),  # RTX 40: the same generation as A100
        (["sm_75", "sm_80", "sm_90"], (7, 0), False),  # V100
        (["sm_75", "sm_86"], (8, 0), False),  # binaries of a later GPU
        (["sm_80", "sm_90"], (12, 0), False),
        (["sm_80", "compute_90"], (12, 0), True),
        (["sm_80", "sm_90a"], (9, 0), True),
        (["sm_80", "sm_100a"], (10, 3), False),
        (["gfx90a"], (9, 0), True),  # AMD's
    ],
)
def test_a_gpu_runs_what_was_built_for_its_generation(
    built: list[str], capability: tuple[int, int], runs: bool
) -> None:
    assert can_run(built, capability) == runs


def test_a_gpu_that_torch_has_no_kernels_for_is_an_error(
    set_gpus: Callable[[int], list], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_gpus(1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    message = r"built for sm_80, sm_90, and NVIDIA TITAN is of compute capability 7\.0; install"
    with pytest.raises(UserError, match=message):
        choose_device()


def test_a_gpu_that_fails_only_when_it_is_used_is_an_error_of_its_rank(
    set_gpus: Callable[[int], list], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: torch.device) -> None:
        raise RuntimeError("CUDA unknown error - this may be due to ...\nMore")

    set_gpus(8)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    line = r"^GPU 3 of .* cannot be used: CUDA unknown error .*; to train on the CPU"
    with pytest.raises(RankError, match=line):
        choose_device()


def test_deepspeed_is_told_that_gpu_and_the_local_rank_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ZeroDivisionError), deepspeed_device(torch.device("cuda", 0)):
        assert devices.os.environ["LOCAL_RANK"] == "0"
        raise ZeroDivisionError
    assert devices.os.environ["LOCAL_RANK"] == "3"
    with deepspeed_device(torch.device("cpu")):
        assert devices.os.environ["LOCAL_RANK"] == "3"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with the device files of NVIDIA's driver, and of two GPUs, in /dev's place."""
    for name in ("nvidiactl", "nvidia-uvm", "nvidia0", "nvidia1"):
        (tmp_path / name).touch()
    monkeypatch.setattr(devices, "DEVICE_FILES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def test_gpus_that_the_driver_does_not_give_are_an_error_with_torchs_reason(
    driver: Path, set_gpus: Callable[[int], list], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040).\nMore"
        )

    set_gpus(0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", refuse)
    with pytest.raises(
        UserError, match=r"driver on your system is too old .*; to train on the CPU"
    ):
        choose_device()


def test_gpus_under_a_build_without_cuda_are_an_error(
    driver: Path, set_gpus: Callable[[int], list], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_gpus(0)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="is built without CUDA"):
        choose_device()


@pytest.mark.parametrize(
    ("name", "value"),
    [("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("DS_ACCELERATOR", "cpu")],
)
def test_gpus_that_are_hidden_leave_the_cpu(
    name: str,
    value: str,
    driver: Path,
    set_gpus: Callable[[int], list],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_gpus(0)
    monkeypatch.setenv(name, value)
    assert choose_device() == torch.device("cpu")


def test_a_machine_with_the_drivers_tools_but_no_gpu_is_a_cpu(
    driver: Path, set_gpus: Callable[[int], list]
) -> None:
    for name in ("nvidia0", "nvidia1"):
        (driver / name).unlink()
    set_gpus(0)
    assert choose_device() == torch.device("cpu")


def ask_all(gpus: list[str]) -> list[Exception | None]:
    """Return what `require_own_gpu` raises on each rank, for ranks with these GPUs."""
    store = dist.HashStore()

    def ask(rank: int) -> Exception | None:
        try:
            require_own_gpu(store, rank, len(gpus), gpus[rank])
        except UserError as error:
            return error
        return None

    with ThreadPoolExecutor(len(gpus)) as threads:
        return list(threads.map(ask, range(len(gpus))))


def test_two_ranks_on_one_gpu_are_refused_on_every_rank() -> None:
    errors = ask_all(["node1 a", "node2 a", "node1 b", "node1 a"])
    assert {str(error).partition(";")[0] for error in errors} == {
        "ranks 0 and 3 have the same GPU of node1"
    }
    assert ask_all(["node1 a", "node2 a", "node1 b"]) == [None] * 3
    assert ask_all(["", ""]) == [None] * 2


def test_nccl_knows_its_gpu_and_leaves_lost_ranks_to_our_watchdog(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING"):
        monkeypatch.delenv(name, raising=False)
    device = torch.device("cuda", 5)
    assert distributed._choose_backend(device) == {"backend": "nccl", "device_id": device}
    assert devices.os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert devices.os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # the user's own choice
    distributed._choose_backend(device)
    assert devices.os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"
    assert distributed._choose_backend(torch.device("cpu")) == {"backend": "gloo"}
