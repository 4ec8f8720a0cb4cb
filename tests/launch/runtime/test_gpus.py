"""launch.runtime.gpus: device names find their GPU and no other. Names are simulated; a second."""

import pytest
import torch

from launch.runtime.gpus import GPUS, SLOW_FP64_TFLOPS, find_gpu
from launch.training.flops import find_peak_flops


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GH200 144G HBM3e", "GH200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("Tesla V100-PCIE-16GB", "V100 PCIe"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        # Names that contain a known one, and are another GPU or a part of one.
        ("NVIDIA RTX A4000", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA A2", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 5090 SUPER", None),
        ("NVIDIA H20", "H20"),
        ("NVIDIA H20-3e", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD Instinct MI300X", None),
        ("", None),
    ],
)
def test_a_device_name_finds_its_gpu_and_no_other(name: str, key: str | None) -> None:
    assert find_gpu(name) == (GPUS[key] if key else None)


def test_gpus_with_slow_fp64_are_known() -> None:
    slow = {name for name, gpu in GPUS.items() if gpu.fp64_tflops < SLOW_FP64_TFLOPS}
    assert {"B300", "L4", "L40S", "A10", "A40", "T4", "RTX 4090", "RTX A6000"} <= slow
    assert not slow & {"H100", "H200", "A100", "B200", "V100", "A30"}


def test_the_peak_is_that_of_the_named_gpu_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    for name, peak in (("NVIDIA H100 80GB HBM3", 989.4e12), ("Tesla T4", None), ("none", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert find_peak_flops(device, torch.bfloat16) == peak
        assert find_peak_flops(device, torch.float32) is None
    assert find_peak_flops(torch.device("cpu"), torch.bfloat16) is None
