"""Gradients of fp32 adapters on a bf16 base are summed over ranks in fp32, on every engine.

One launch of two ranks trains two steps on each, with LoRA, which autocasts, and with DoRA, which
does not (workers/gradient_dtypes.py). About 10 s.
"""

import json
from collections.abc import Callable
from pathlib import Path

from tests.support.paths import WORKERS


def test_gradients_of_adapters_are_summed_in_fp32(
    launch: Callable, recipe: Path, tmp_path: Path
) -> None:
    launch(WORKERS / "gradient_dtypes.py", recipe, tmp_path, ranks=2)
    assert json.loads((tmp_path / "dtypes.json").read_text()) == {
        f"{engine} {method}": ["torch.float32"]
        for engine in ("zero3", "zero2", "fsdp")
        for method in ("lora", "dora")
    }
