"""ZeRO-3, which gathers a decoder layer at a time, trains with FSDP2's losses to the bit.

With gradient checkpointing and without it, in fp32 and in bf16: nothing that DeepSpeed's hooks do
is lost, done twice, or done in another order. One launch of two ranks runs all. About 15 s.
"""

import json
from collections.abc import Callable
from pathlib import Path

from tests.support.cases import CHECKPOINTING, NO_SCORES
from tests.support.paths import WORKERS
from tests.support.runs import read_losses

DTYPES = ("float32", "bfloat16")


def test_zero3_has_the_losses_of_fsdp_to_the_bit(
    launch: Callable, recipe: Path, tmp_path: Path
) -> None:
    runs: dict[str, Path] = {}
    cases = []
    for dtype in DTYPES:
        for name, settings in {
            "fsdp": ["engine=fsdp"],
            "zero3": ["engine=zero3"],
            "checkpointed": ["engine=zero3", CHECKPOINTING],
        }.items():
            runs[f"{name} {dtype}"] = tmp_path / f"{name}-{dtype}"
            shared = ["adapter.method=lora", f"model.dtype={dtype}", NO_SCORES]
            cases.append(([*settings, *shared], str(tmp_path / f"{name}-{dtype}")))
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases))
    launch(WORKERS / "train.py", recipe, path, ranks=2)
    for dtype in DTYPES:
        wanted = read_losses(runs[f"fsdp {dtype}"])
        assert wanted[-1] < 0.9 * wanted[0]
        assert read_losses(runs[f"zero3 {dtype}"]) == wanted
        assert read_losses(runs[f"checkpointed {dtype}"]) == wanted
