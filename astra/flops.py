"""Count the floating-point operations (FLOPs) of a calibration from shapes.

A multiply and an add are two operations. For LAPACK routines the leading terms are taken (Golub and
Van Loan, Matrix Computations).
"""

from collections.abc import Mapping
from typing import Literal

from torch import nn

from astra.moments import BLOCK_WIDTH, Group, Statistic

Decomposition = Literal["output", "input", "matrix"]
"""What a method decomposes: the outputs' second moment, the inputs', or a matrix shaped like W."""


def count_sum_flops(group: Group, linears: Mapping[str, nn.Linear]) -> int:
    """Return the operations that add one token to a group's sums (moments.accumulate_moments)."""
    outer_product = 0  # the blocks of moments.Moment
    for i in range(0, group.size, BLOCK_WIDTH):
        outer_product += 2 * (group.size - i) * min(BLOCK_WIDTH, group.size - i)
    if group.statistic in ("input", "weight"):
        return outer_product
    linear = linears[group.modules[0]]
    return outer_product + 2 * linear.in_features * linear.out_features  # y = W x, or dy x^T


def count_forming_flops(statistic: Statistic, linear: nn.Linear) -> int:
    """Return the operations that form one module's `C` from its group's sums (output_moment)."""
    if statistic != "input":
        return 0
    d_in, d_out = linear.in_features, linear.out_features
    if d_out > d_in:  # geqrf of W, then R S R^T
        return 2 * d_in**2 * d_out - 2 * d_in**3 // 3 + 4 * d_in**3
    return 2 * d_out * d_in**2 + 2 * d_out**2 * d_in  # W S W^T


def count_eigen_flops(statistic: Statistic, linear: nn.Linear, lora_rank: int) -> int:
    """Return the operations that find and check r eigenvectors of one module's `C` (eigen)."""
    d_out = linear.out_features
    size = min(linear.in_features, d_out) if statistic == "input" else d_out
    reduction = 4 * size**3 // 3  # sytrd
    vectors = 2 * size**2 * lora_rank  # ormqr
    checks = 2 * size**2 * lora_rank + 4 * d_out * lora_rank**2
    # Q is applied once to the vectors, and by the checks once forth and once back.
    apply_basis = 2 * lora_rank * (2 * d_out * size - size**2) if d_out > size else 0
    return reduction + vectors + checks + 3 * apply_basis


def count_svd_flops(statistic: Statistic, linear: nn.Linear) -> int:
    """Return the operations of a singular value decomposition of W, or of W times an input moment.

    Counted for the R-SVD of Golub and Van Loan.
    """
    d_in, d_out = linear.in_features, linear.out_features
    smaller, larger = sorted((d_in, d_out))
    decomposition = 6 * larger * smaller**2 + 20 * smaller**3
    if statistic != "input":
        return decomposition
    # For a method that decomposes W S, S being its inputs' moment: W S, then solving with S.
    return decomposition + 2 * d_out * d_in**2 + 2 * d_in**3 // 3


def count_solve_flops(
    group: Group,
    linears: Mapping[str, nn.Linear],
    lora_ranks: Mapping[str, int],
    decomposition: Decomposition = "output",
) -> int:
    """Return the operations that solve every module of a group, given its sums.

    Args:
        lora_ranks: module name -> r.
    """
    total = 0
    for name in group.modules:
        linear, lora_rank = linears[name], lora_ranks[name]
        match decomposition:
            case "output":
                total += count_forming_flops(group.statistic, linear)
                total += count_eigen_flops(group.statistic, linear, lora_rank)
            case "input":
                total += 4 * linear.in_features**3 // 3  # sytrd
                total += 4 * linear.in_features**2 * lora_rank  # ormqr and the checks
            case "matrix":
                total += count_svd_flops(group.statistic, linear)
    return total
