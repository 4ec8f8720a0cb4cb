"""What a run says of its base: where it is not scored, and where it is rounded.

Needs nothing; 2 s.
"""

from types import SimpleNamespace

import pytest
import torch

from launch.config.loading import read_recipe
from launch.config.schema import Eval
from launch.stages.initialise import describe_rounded_start, describe_unscored_base


def test_a_benchmark_that_came_after_the_base_was_scored_is_named() -> None:
    asked, silent = Eval(baseline=True), Eval()
    line = describe_unscored_base(asked, ["gsm8k", "mbpp", "math"], ["gsm8k"])
    assert line.startswith("eval.baseline: the base is not scored on mbpp, math, ")
    assert describe_unscored_base(asked, ["gsm8k"], ["gsm8k", "mbpp"]) is None
    assert describe_unscored_base(silent, ["gsm8k"], []) is None


@pytest.mark.parametrize(
    ("engine", "method", "dtype", "stored", "is_rounded"),
    [
        ("zero3", "full", torch.bfloat16, {"F32"}, True),
        ("zero2", "full", torch.bfloat16, {"BF16", "F16"}, True),
        ("zero3", "full", torch.bfloat16, {"BF16"}, False),
        ("zero3", "full", torch.float32, {"F32"}, False),
        ("zero3", "lora", torch.bfloat16, {"F32"}, False),
        ("fsdp", "full", torch.bfloat16, {"F32"}, False),
    ],
)
def test_full_fine_tuning_that_starts_from_rounded_weights_is_told(
    engine: str, method: str, dtype: torch.dtype, stored: set[str], is_rounded: bool
) -> None:
    recipe = read_recipe("codefeedback", [f"engine={engine}", f"adapter.method={method}"])
    inputs = SimpleNamespace(dtype=dtype, model=SimpleNamespace(dtypes=stored))
    line = describe_rounded_start(recipe, inputs)
    assert (line or "").startswith("engine: ") == is_rounded
