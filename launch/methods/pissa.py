"""PiSSA (arXiv 2404.02948) and MiLoRA (arXiv 2406.09044): singular triplets of the weight.

s B0 A0 is the sum of the r largest triplets (PiSSA), or of the r smallest (MiLoRA).
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from launch.methods.base import Method, MethodSettings, read_solved_factors

if TYPE_CHECKING:
    from astra.calibrate import ModuleProblem, Solution


def solve_pissa(problem: "ModuleProblem", settings: MethodSettings) -> "Solution":
    """Find A0 and B0 from the r largest singular triplets."""
    from astra.inits import init_pissa

    a0, b0 = init_pissa(problem.weight, problem.lora_rank, settings.scaling)
    return {"a0": a0, "b0": b0}


def solve_milora(problem: "ModuleProblem", settings: MethodSettings) -> "Solution":
    """Find A0 and B0 from the r smallest singular triplets."""
    from astra.inits import init_milora

    a0, b0 = init_milora(problem.weight, problem.lora_rank, settings.scaling)
    return {"a0": a0, "b0": b0}


METHOD = Method(
    statistic="weight",
    decomposition="matrix",
    solve=solve_pissa,
    solution="factors",
    make_factors=read_solved_factors,
    depends_on_scaling=True,
    starts_on_residual=True,
)
MILORA = replace(METHOD, solve=solve_milora)
