"""Astra: B0 = V, A0 = V^T W, with V eigenvectors of the outputs' second moment (arXiv 2602.19111).

Two controls say where a gain comes from. `eigen_select: haar` takes a random orthonormal basis for V,
without a calibration. `start: zero` keeps B0 = V and begins at A0 = 0, so on W itself.
"""

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
    settings: MethodSettings,
    solution: "Solution",
) -> "tuple[Tensor, Tensor]":
    """Make A0 = V^T W, or 0, and B0 = V from the solution's eigenvectors V."""
    from astra.inits import init_astra

    a0, b0 = init_astra(weight, solution["vectors"], solution["values"])
    return _choose_start(a0, settings), b0


def make_haar_factors(
    name: str, weight: "Tensor", lora_rank: int, settings: MethodSettings, _solution: None
) -> "tuple[Tensor, Tensor]":
    """Draw B0 from (calibration.seed, module name), and make A0 = B0^T W, or 0."""
    from astra.inits import init_haar

    a0, b0 = init_haar(weight, lora_rank, settings.calibration_seed, name)
    return _choose_start(a0, settings), b0


def _choose_start(projection: "Tensor", settings: MethodSettings) -> "Tensor":
    """Return A0: `projection`, V^T W, or zeros in its place."""
    if settings.start == "projection":
        return projection
    return projection.new_zeros(projection.shape)


HAAR = Method(make_factors=make_haar_factors, variant="eigen_select", starts_on_residual=True)
METHOD = Method(
    statistic="output",
    decomposition="output",
    solve=solve_module,
    solution="subspace",
    make_factors=make_factors,
    variant="eigen_select",
    by_variant={"haar": HAAR},
    starts_on_residual=True,
)
