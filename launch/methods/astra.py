"""Astra: B0 = V, A0 = V^T W, with V eigenvectors of the outputs' second moment (arXiv 2602.19111)."""

from typing import TYPE_CHECKING

from launch.methods.base import Method, MethodSettings

if TYPE_CHECKING:
    from torch import Tensor

    from astra.calibrate import ModuleProblem, Solution


def solve_module(problem: "ModuleProblem", settings: MethodSettings) -> "Solution":
    """Find the eigenvectors that `eigen_select` names, with their spectrum."""
    from astra.calibrate import solve_subspace

    return solve_subspace(problem, settings.eigen_select, settings.calibration_seed)


def make_factors(
    _name: str,
    weight: "Tensor",
    _lora_rank: int,
    _settings: MethodSettings,
    solution: "Solution",
) -> "tuple[Tensor, Tensor]":
    """Make A0 = V^T W and B0 = V from the solution's eigenvectors V."""
    from astra.eigen import Subspace
    from astra.inits import init_astra

    return init_astra(weight, Subspace(**solution))


METHOD = Method(
    statistic="output",
    decomposition="output",
    solve=solve_module,
    solution="subspace",
    make_factors=make_factors,
    variant="eigen_select",
    starts_on_residual=True,
)
