"""Known GPUs by name: what they can do at most, and their memory. The one table of GPUs.

Every row names the vendor's document that its numbers are of. They are as remembered from there;
in 2026-11 those of A100, H100 (SXM, PCIe), B200, L40 and L40S were compared with other pages that
quote the same documents. Look a number up before it is quoted. Three kinds of numbers are not
printed there: fp64 of the GeForce, RTX and L, A10, A40 and T4 cards is 1/64 of fp32, 1/32 on the
T4; memory of cards with GDDR6 and ECC is 15/16 of the nominal one, as CUDA reports it; and links
are one direction, half of what is printed.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU. Rates are dense peaks, on tensor cores where there are any of that dtype."""

    bf16_tflops: float | None  # None: no bf16 matrix products in hardware
    fp32_tflops: float  # without tensor cores
    fp64_tflops: float
    memory: float  # GiB
    bandwidth: float  # GB/s, of its memory
    nvlink: float | None  # GB/s to the other GPUs of a node, one direction; None: PCIe alone
    pcie: float  # GB/s to the host, one direction
    source: str

    @property
    def tf32_tflops(self) -> float:
        """Peak of fp32 matrices that are multiplied in TF32: half of bf16's wherever it is printed."""
        return self.fp32_tflops if self.bf16_tflops is None else self.bf16_tflops / 2

    @property
    def link(self) -> float:
        """GB/s between the GPUs of a node, one direction.

        Bridges of NVLink between two or four cards count for nothing: a ring over a whole node also
        passes through PCIe.
        """
        return self.nvlink or self.pcie


_HOPPER, _AMPERE = "NVIDIA H100 data sheet", "NVIDIA A100 data sheet"
_VOLTA = "NVIDIA V100 data sheet"
# Words of torch.cuda.get_device_name() that all must be there -> the GPU. The first match counts,
# so more words stand before fewer.
GPUS = {
    "GB300": Gpu(2500, 80, 1.3, 277, 8000, 900, 128, "NVIDIA GB300 NVL72 data sheet"),
    "B300": Gpu(2250, 75, 1.25, 262, 7700, 900, 64, "NVIDIA HGX B300 page"),
    "GB200": Gpu(2500, 80, 40, 186, 8000, 900, 128, "NVIDIA GB200 NVL72 data sheet"),
    "B200": Gpu(2250, 75, 37, 179, 7700, 900, 64, "NVIDIA HGX B200 data sheet"),
    "GH200": Gpu(989.4, 67, 67, 96, 4000, 450, 64, "NVIDIA GH200 data sheet"),
    "H200 NVL": Gpu(835, 60, 60, 141, 4800, None, 64, "NVIDIA H200 data sheet"),
    "H200": Gpu(989.4, 67, 67, 141, 4800, 450, 64, "NVIDIA H200 data sheet"),
    "H100 NVL": Gpu(835, 60, 60, 94, 3900, None, 64, _HOPPER),
    "H100 PCIe": Gpu(756, 51, 51, 80, 2000, None, 64, _HOPPER),
    "H100": Gpu(989.4, 67, 67, 80, 3350, 450, 64, _HOPPER),
    "H800": Gpu(989.4, 67, 1, 80, 3350, 200, 64, "NVIDIA H800 data sheet"),
    "H20": Gpu(148, 44, 1, 96, 4000, 450, 64, "NVIDIA H20 data sheet"),
    "A100 80GB PCIe": Gpu(312, 19.5, 19.5, 80, 1935, None, 32, _AMPERE),
    "A100 80GB": Gpu(312, 19.5, 19.5, 80, 2039, 300, 32, _AMPERE),
    "A100 PCIe": Gpu(312, 19.5, 19.5, 40, 1555, None, 32, _AMPERE),
    "A100": Gpu(312, 19.5, 19.5, 40, 1555, 300, 32, _AMPERE),
    "A800 80GB": Gpu(312, 19.5, 19.5, 80, 2039, 200, 32, "NVIDIA A800 data sheet"),
    "A800": Gpu(312, 19.5, 19.5, 40, 1555, None, 32, "NVIDIA A800 data sheet"),
    "A30": Gpu(165, 10.3, 10.3, 24, 933, None, 32, "NVIDIA A30 data sheet"),
    "V100 PCIe 32GB": Gpu(None, 14, 7, 32, 900, None, 16, _VOLTA),
    "V100 PCIe": Gpu(None, 14, 7, 16, 900, None, 16, _VOLTA),
    "V100 32GB": Gpu(None, 15.7, 7.8, 32, 900, 150, 16, _VOLTA),
    "V100": Gpu(None, 15.7, 7.8, 16, 900, 150, 16, _VOLTA),
    "L40S": Gpu(362.05, 91.6, 1.43, 45, 864, None, 32, "NVIDIA L40S data sheet"),
    "L40": Gpu(181.05, 90.5, 1.41, 45, 864, None, 32, "NVIDIA L40 data sheet"),
    "L4": Gpu(121, 30.3, 0.47, 22.5, 300, None, 32, "NVIDIA L4 data sheet"),
    "A40": Gpu(149.7, 37.4, 0.58, 45, 696, None, 32, "NVIDIA A40 data sheet"),
    "A10G": Gpu(70, 35, 0.55, 22.5, 600, None, 32, "AWS, EC2 G5 instances"),
    "A10": Gpu(125, 31.2, 0.49, 22.5, 600, None, 32, "NVIDIA A10 data sheet"),
    "T4": Gpu(None, 8.1, 0.25, 15, 300, None, 16, "NVIDIA T4 data sheet"),
    "RTX 6000 Ada": Gpu(364.25, 91.1, 1.42, 48, 960, None, 32, "NVIDIA RTX 6000 Ada data sheet"),
    "RTX A6000": Gpu(154.8, 38.7, 0.6, 48, 768, None, 32, "NVIDIA RTX A6000 data sheet"),
    "RTX 5090": Gpu(209.5, 104.8, 1.64, 32, 1792, None, 64, "NVIDIA RTX Blackwell white paper"),
    "RTX 4090": Gpu(165.2, 82.6, 1.29, 24, 1008, None, 32, "NVIDIA Ada white paper"),
    "RTX 3090": Gpu(71, 35.6, 0.56, 24, 936, None, 32, "NVIDIA Ampere GA102 white paper"),
}
SLOW_FP64_TFLOPS = 2.0  # below it a CPU may solve eigenproblems sooner
# Words in the names of GPUs that are not the whole GPU, or another one of a similar name.
OTHER_WORDS = {"MIG", "LAPTOP", "MOBILE", "D", "TI", "SUPER", "3E"}


def find_gpu(name: str) -> Gpu | None:
    """Find the GPU whose device name is `name`; None where it is not known.

    Words are compared whole and in any case: an RTX A4000 is no A40, a GH200 no H200. A part of a
    GPU (MIG) and variants (of laptops, Ti, Super, H20-3e) are not known.
    """
    words = set(re.findall(r"[A-Z0-9]+", name.upper()))
    if words & OTHER_WORDS:
        return None
    for key, gpu in GPUS.items():
        if words.issuperset(key.upper().split()):
            return gpu
    return None
