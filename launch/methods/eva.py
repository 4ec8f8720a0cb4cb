"""EVA (arXiv 2410.07170): A0's rows are principal components of the layer's inputs; B0 = 0.

Every module gets the same rank here; the paper redistributes ranks by explained variance.
"""

from typing import TYPE_CHECKING

from launch.methods.base import Method, MethodSettings, read_solved_factors

if TYPE_CHECKING:
    from astra.calibrate import ModuleProblem, Solution


def solve_module(problem: "ModuleProblem", settings: MethodSettings) -> "Solution":
    """Find A0 from the inputs' covariance."""
    from astra.inits import init_eva

    (moment,) = problem.sums
    a0, b0 = init_eva(
        moment.covariance(),
        len(problem.weight),
        problem.lora_rank,
        settings.calibration_seed,
        problem.name,
    )
    return {"a0": a0, "b0": b0}


METHOD = Method(
    statistic="input",
    decomposition="input",
    solve=solve_module,
    solution="factors",
    make_factors=read_solved_factors,
)
