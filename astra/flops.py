"""What the calibration's arithmetic costs, counted from shapes, in floating-point operations."""

from collections.abc import Mapping
from typing import Literal

from torch import nn

from astra.moments import WIDTH, Group, Statistic

Decomposed = Literal["output", "input", "matrix"]
"""What a method decomposes: the outputs' second moment, the inputs', or a matrix of the weight's shape."""


def sum_flops(group: Group, linears: Mapping[str, nn.Linear]) -> int:
    """Of adding one token to a group's moment: see moments.Moment.add, moments.accumulating."""
    triangle = sum(
        2 * (group.size - i) * min(WIDTH, group.size - i) for i in range(0, group.size, WIDTH)
    )
    if group.of in ("input", "weight"):
        return triangle
    linear = linears[group.modules[0]]
    return triangle + 2 * linear.in_features * linear.out_features  # y = W x, or dy x^T


def forming_flops(of: Statistic, linear: nn.Linear) -> int:
    """Of one module's `C` from its group's moment, at its smallest size: see factor.output_moment."""
    if of != "input":
        return 0
    d_in, d_out = linear.in_features, linear.out_features
    if d_out > d_in:  # geqrf of W, then R S R^T
        return 2 * d_in**2 * d_out - 2 * d_in**3 // 3 + 4 * d_in**3
    return 2 * d_out * d_in**2 + 2 * d_out**2 * d_in


def solving_flops(of: Statistic, linear: nn.Linear, rank: int) -> int:
    """Of the eigenproblem of one module's `C`: sytrd for all eigenvalues, ormqr for `rank` vectors, their checks."""
    d_out = linear.out_features
    size = min(linear.in_features, d_out) if of == "input" else d_out
    turned = 2 * rank * (2 * d_out * size - size**2) if d_out > size else 0
    return (
        4 * size**3 // 3
        + 2 * size**2 * rank
        + 3 * turned
        + 2 * size**2 * rank
        + 4 * d_out * rank**2
    )


def svd_flops(of: Statistic, linear: nn.Linear) -> int:
    """Of the singular value decomposition of a weight, or of it times an input moment (Golub and Van Loan's R-SVD)."""
    d_in, d_out = linear.in_features, linear.out_features
    less, more = sorted((d_in, d_out))
    return (
        6 * more * less**2
        + 20 * less**3
        + (2 * d_out * d_in**2 + 2 * d_in**3 // 3 if of == "input" else 0)
    )


def solve_flops(
    group: Group,
    linears: Mapping[str, nn.Linear],
    ranks: Mapping[str, int],
    decomposed: Decomposed = "output",
) -> int:
    """Of forming and solving every module of a group."""
    modules = [(linears[name], ranks[name]) for name in group.modules]
    match decomposed:
        case "output":
            return sum(
                forming_flops(group.of, x) + solving_flops(group.of, x, rank) for x, rank in modules
            )
        case "input":
            return sum(
                4 * x.in_features**3 // 3 + 4 * x.in_features**2 * rank for x, rank in modules
            )
        case "matrix":
            return sum(svd_flops(group.of, x) for x, _ in modules)
