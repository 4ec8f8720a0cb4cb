"""OLoRA (arXiv 2406.01775): the first columns of Q and rows of R of W = Q R."""

from typing import TYPE_CHECKING

from launch.methods.base import Method, MethodSettings, read_solved_factors

if TYPE_CHECKING:
    from astra.calibrate import ModuleProblem, Solution


def solve_module(problem: "ModuleProblem", _settings: MethodSettings) -> "Solution":
    """Find A0 and B0 from the QR decomposition of the weight."""
    from astra.inits import init_olora

    a0, b0 = init_olora(problem.weight, problem.lora_rank)
    return {"a0": a0, "b0": b0}


METHOD = Method(
    statistic="weight",
    decomposition="matrix",
    solve=solve_module,
    solution="factors",
    make_factors=read_solved_factors,
    starts_on_residual=True,
)
