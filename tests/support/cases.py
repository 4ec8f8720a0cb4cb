"""The matrices of launches that several test modules, or a test and its worker script, share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch


@dataclass(frozen=True)
class LaunchCase:
    """A launch of train.py.

    A case with a launcher is started as a user would, by a command of its own. The others share one
    launch for each world size. A `full` case runs in `make test-full` only.
    """

    name: str
    world_size: int
    settings: tuple[str, ...]
    launcher: str | None = None
    full: bool = False

    def __str__(self) -> str:
        return self.name


def make_params(cases: list[LaunchCase]) -> list:
    """Return the cases as pytest parameters, with the mark `full` where it applies."""
    marks = {True: [pytest.mark.full], False: []}
    return [pytest.param(case, marks=marks[case.full], id=str(case)) for case in cases]


# Settings that several cases share.
NO_SCORES = "eval.suites=[]"
CHECKPOINTING = "train.gradient_checkpointing=true"
PACKING = "data.packing=true"

# Launches that must all train alike: every engine, micro batches of the global batch of 10 with and
# without accumulation, gradient checkpointing, packing. `make test` has every engine, 1 to 4 ranks,
# shards of equal and unequal size, and packing under ZeRO-3 and FSDP2. The `full` cells are the
# same engines and features in other combinations of world size and micro batch.
ZERO3_1 = LaunchCase("zero3-1", 1, ("train.micro_batch=3", "engine=zero3"), launcher="python")
ZERO3_2 = LaunchCase(
    "zero3-2", 2, ("train.micro_batch=2", CHECKPOINTING, "engine=zero3"), launcher="torchrun"
)
ZERO3_4 = LaunchCase("zero3-4", 4, ("train.micro_batch=1", "engine=zero3"))
ZERO3_PACKED = LaunchCase(
    "zero3-packed", 2, ("train.micro_batch=5", "engine=zero3", NO_SCORES, PACKING)
)
ZERO2_1 = LaunchCase("zero2-1", 1, ("train.micro_batch=10", "engine=zero2", NO_SCORES), full=True)
ZERO2_2 = LaunchCase("zero2-2", 2, ("train.micro_batch=5", "engine=zero2"))
ZERO2_PACKED = LaunchCase(
    "zero2-packed", 4, ("train.micro_batch=1", "engine=zero2", NO_SCORES, PACKING), full=True
)
OFFLOAD_1 = LaunchCase(
    "offload-1", 1, ("train.micro_batch=3", "engine=zero3_offload", NO_SCORES), full=True
)
OFFLOAD_2 = LaunchCase("offload-2", 2, ("train.micro_batch=5", "engine=zero3_offload"))
OFFLOAD_4 = LaunchCase(
    "offload-4", 4, ("train.micro_batch=1", "engine=zero3_offload", NO_SCORES), full=True
)
FSDP_1 = LaunchCase("fsdp-1", 1, ("train.micro_batch=10", "engine=fsdp", NO_SCORES), full=True)
FSDP_2 = LaunchCase(
    "fsdp-2", 2, ("train.micro_batch=2", CHECKPOINTING, "engine=fsdp"), launcher="torchrun"
)
FSDP_3 = LaunchCase("fsdp-3", 3, ("train.micro_batch=1", "engine=fsdp"), launcher="deepspeed")
FSDP_4 = LaunchCase("fsdp-4", 4, ("train.micro_batch=3", "engine=fsdp", NO_SCORES), full=True)
FSDP_PACKED = LaunchCase(
    "fsdp-packed", 2, ("train.micro_batch=1", "engine=fsdp", NO_SCORES, PACKING)
)
SINGLE = LaunchCase("single", 1, ("train.micro_batch=4", "engine=single", CHECKPOINTING))
LAUNCHES = [
    *(ZERO3_1, ZERO3_2, ZERO3_4, ZERO3_PACKED),
    *(ZERO2_1, ZERO2_2, ZERO2_PACKED),
    *(OFFLOAD_1, OFFLOAD_2, OFFLOAD_4),
    *(FSDP_1, FSDP_2, FSDP_3, FSDP_4, FSDP_PACKED),
    SINGLE,
]
# Launches of other dtypes and methods.
BF16 = LaunchCase("bf16", 2, ("model.dtype=bfloat16", NO_SCORES))
FSDP_BF16 = LaunchCase("fsdp-bf16", 2, ("model.dtype=bfloat16", NO_SCORES, "engine=fsdp"))
LORA = LaunchCase("lora", 2, ("adapter.method=lora", NO_SCORES))


def train_case(trained: Callable[..., Path], case: LaunchCase) -> Path:
    """Return the run folder of a case, trained once by the fixture `trained`."""
    if case.launcher is not None:
        return trained(case.world_size, *case.settings, launcher=case.launcher)
    along = [
        other.settings
        for other in (*LAUNCHES, BF16, FSDP_BF16, LORA)
        if (other.world_size, other.launcher, other.full) == (case.world_size, None, case.full)
    ]
    return trained(case.world_size, *case.settings, along=along)


# Settings of the methods that workers/methods.py runs, and the one whose run it also resumes.
METHODS = {
    "pissa": ["adapter.method=pissa", "export.rank=3"],
    "milora": ["adapter.method=milora"],
    "olora": ["adapter.method=olora", "export.rank=5", "export.merged=true", "data.held_out=9"],
    "corda-ipm": ["adapter.method=corda"],
    "corda-kpm": ["adapter.method=corda", "adapter.corda_mode=kpm"],
    "eva": ["adapter.method=eva"],
    "lora_ga": ["adapter.method=lora_ga"],
    "lora_ga-windows": ["adapter.method=lora_ga", "calibration.memory_gib=0.0004"],
    "reference": [
        "calibration.statistics=reference",
        "calibration.batch_size=1",
        "adapter.eigen_select=largest",
    ],
    "haar": ["adapter.eigen_select=haar"],
    "haar-zero": ["adapter.eigen_select=haar", "adapter.start=zero"],
    "largest-zero": ["adapter.eigen_select=largest", "adapter.start=zero"],
}
RESUMED_METHOD = "corda-kpm"

# Settings of the methods that workers/trainable.py runs and resumes.
TRAINABLE_STEPS = ["train.max_steps=4", "train.checkpoint_every=2"]
FULL_FINE_TUNING = [
    "adapter.method=full",
    CHECKPOINTING,
    "train.weight_decay=0.1",
    "train.lr=0.003",
]
LORA_PLUS = [
    "adapter.method=lora",
    "train.lr_ratio=16",
    "train.lr=0.003",
    "train.weight_decay=0.1",
]
TRAINABLE_METHODS = {
    "rslora": ["adapter.method=rslora", "train.weight_decay=0.1"],
    "dora": ["adapter.method=dora", CHECKPOINTING, "export.merged=true"],
    "lora-plus": LORA_PLUS,
    "dora-plus": ["adapter.method=dora", "train.lr_ratio=4", "train.lr=0.005"],
    "full": FULL_FINE_TUNING,
    "full_bf16": [*FULL_FINE_TUNING, "model.dtype=bfloat16", "train.lr=0.0003"],
}

# Numbers of prompts that workers/generation.py answers: fewer than ranks, as many as places, more.
PROMPT_COUNTS = (1, 2, 5, 14)
NEW_TOKENS = 19  # at most, in a response


def make_prompts(count: int) -> list[list[int]]:
    """Return `count` random prompts of 1 to 13 token ids, the same for the same `count`."""
    draw = torch.Generator().manual_seed(count)
    lengths = [1 + 3 * (i % 5) for i in range(count)]
    return [torch.randint(1, 40, (length,), generator=draw).tolist() for length in lengths]
