"""Known GPUs by name, and what they can do at most. The one table of GPUs.

Numbers are from memory of NVIDIA's data sheets and white papers; of B200, B300, L4, L40, L40S, RTX
4090 and T4 alone some were looked up again (2026-11), on other pages. Look one up before it is
quoted. Where a data sheet gives no fp64 rate, it is 1/64 of the fp32 rate, 1/32 on the T4.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU. Rates are dense peaks, on tensor cores where there are any of that dtype."""

    bf16_tflops: float | None  # None: no bf16 matrix products in hardware
    fp64_tflops: float


# Words of torch.cuda.get_device_name() that all must be there -> the GPU. The first match counts,
# so more words stand before fewer.
GPUS = {
    "GB300": Gpu(2500.0, 1.3),
    "B300": Gpu(2250.0, 1.25),
    "GB200": Gpu(2500.0, 40.0),
    "B200": Gpu(2250.0, 37.0),
    "GH200": Gpu(989.4, 67.0),
    "H200 NVL": Gpu(835.0, 60.0),
    "H200": Gpu(989.4, 67.0),
    "H100 NVL": Gpu(835.0, 60.0),
    "H100 PCIe": Gpu(756.0, 51.0),
    "H100": Gpu(989.4, 67.0),
    "H800": Gpu(989.4, 1.0),
    "H20": Gpu(148.0, 1.0),
    "A100": Gpu(312.0, 19.5),
    "A800": Gpu(312.0, 19.5),
    "A30": Gpu(165.0, 10.3),
    "V100": Gpu(None, 7.8),
    "L40S": Gpu(362.05, 1.43),
    "L40": Gpu(181.05, 1.41),
    "L4": Gpu(121.0, 0.47),
    "A40": Gpu(149.7, 0.58),
    "A10G": Gpu(70.0, 0.55),
    "A10": Gpu(125.0, 0.49),
    "T4": Gpu(None, 0.25),
    "RTX 6000 Ada": Gpu(364.25, 1.42),
    "RTX A6000": Gpu(154.8, 0.6),
    "RTX 5090": Gpu(209.5, 1.64),
    "RTX 4090": Gpu(165.2, 1.29),
    "RTX 3090": Gpu(71.0, 0.56),
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
