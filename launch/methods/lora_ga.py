"""LoRA-GA (arXiv 2407.05000): singular vectors of the loss's gradient with respect to the weight."""

from typing import TYPE_CHECKING

from launch.methods.base import Method, MethodSettings, read_solved_factors

if TYPE_CHECKING:
    from astra.calibrate import ModuleProblem, Solution


def solve_module(problem: "ModuleProblem", _settings: MethodSettings) -> "Solution":
    """Find A0 and B0 from the mean gradient over the calibration's answer tokens."""
    from astra.inits import init_lora_ga

    (gradient,) = problem.sums
    a0, b0 = init_lora_ga(gradient.mean(), problem.lora_rank)
    return {"a0": a0, "b0": b0}


METHOD = Method(
    statistic="gradient",
    decomposition="matrix",
    solve=solve_module,
    solution="factors",
    make_factors=read_solved_factors,
    starts_on_residual=True,
    needs_exact_rank=True,  # B0 holds the vectors r + 1 to 2r
    vectors_per_rank=2,
)
