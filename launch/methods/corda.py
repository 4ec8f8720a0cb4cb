"""CorDA (arXiv 2406.05223): singular triplets of W C, with C the inputs' damped second moment.

`adapter.corda_mode` takes the r largest (ipm) or the r smallest (kpm). Both take C from the training
rows, unless `calibration.data` names others; the paper's kpm takes it from question answering.
"""

from typing import TYPE_CHECKING

from launch.methods.base import Method, MethodSettings, read_solved_factors

if TYPE_CHECKING:
    from astra.calibrate import ModuleProblem, Solution


def solve_module(problem: "ModuleProblem", settings: MethodSettings) -> "Solution":
    """Find A0 and B0 from the weight and the inputs' second moment."""
    from astra.inits import init_corda

    (moment,) = problem.sums
    a0, b0 = init_corda(
        problem.weight,
        moment.second_moment(),
        problem.lora_rank,
        settings.scaling,
        settings.corda_mode,
    )
    return {"a0": a0, "b0": b0}


METHOD = Method(
    statistic="input",
    decomposition="matrix",
    solve=solve_module,
    solution="factors",
    make_factors=read_solved_factors,
    variant="corda_mode",
    depends_on_scaling=True,
    starts_on_residual=True,
)
