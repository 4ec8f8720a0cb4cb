"""A resumed run says on which benchmarks its base is not scored.

Needs nothing; 2 s.
"""

from launch.config.schema import Eval
from launch.stages.initialise import describe_unscored_base


def test_a_benchmark_that_came_after_the_base_was_scored_is_named() -> None:
    asked, silent = Eval(baseline=True), Eval()
    line = describe_unscored_base(asked, ["gsm8k", "mbpp", "math"], ["gsm8k"])
    assert line.startswith("eval.baseline: the base is not scored on mbpp, math, ")
    assert describe_unscored_base(asked, ["gsm8k"], ["gsm8k", "mbpp"]) is None
    assert describe_unscored_base(silent, ["gsm8k"], []) is None
