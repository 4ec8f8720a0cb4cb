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


def count_eigh_flops(size: int, num_vectors: int, device_type: str) -> int:
    """Return the operations that find eigenvectors of one matrix of `size` rows (astra.eigen).

    On CPUs the chosen vectors alone are computed, on GPUs cuSOLVER's syevd computes all: by divide
    and conquer (4/3 size^3 at most; Tisseur and Dongarra, SIAM J. Sci. Comput. 20, 1999).
    """
    reduction = 4 * size**3 // 3  # sytrd
    if device_type == "cpu":
        return reduction + 2 * size**2 * num_vectors  # ormqr
    return reduction + 4 * size**3 // 3 + 2 * size**3  # stedc, ormtr


def count_eigen_flops(
    statistic: Statistic, linear: nn.Linear, lora_rank: int, device_type: str
) -> int:
    """Return the operations that find and check r eigenvectors of one module's `C` (eigen)."""
    d_out = linear.out_features
    size = min(linear.in_features, d_out) if statistic == "input" else d_out
    eigenpairs = count_eigh_flops(size, lora_rank, device_type)
    checks = 2 * size**2 * lora_rank + 4 * d_out * lora_rank**2
    # Q is applied once to the vectors, and by the checks once forth and once back.
    apply_basis = 2 * lora_rank * (2 * d_out * size - size**2) if d_out > size else 0
    return eigenpairs + checks + 3 * apply_basis


def count_svd_flops(
    statistic: Statistic, linear: nn.Linear, lora_rank: int, device_type: str
) -> int:
    """Return the operations that find r singular triplets of W, or of W times an input moment.

    On CPUs counted for the R-SVD of Golub and Van Loan, which finds all; on GPUs for the Gram
    matrix of svd.decompose_gram.
    """
    d_in, d_out = linear.in_features, linear.out_features
    smaller, larger = sorted((d_in, d_out))
    if device_type == "cpu":
        decomposition = 6 * larger * smaller**2 + 20 * smaller**3
    else:
        gram = 2 * larger * smaller**2
        decomposition = gram + count_eigh_flops(smaller, lora_rank, device_type)
        # W V; its QR factorisation; U; and W^T U for the check.
        decomposition += 2 * lora_rank * larger * (2 * smaller + 2 * lora_rank)
    if statistic != "input":
        return decomposition
    # For a method that decomposes W S, S being its inputs' moment: W S, then solving with S.
    return decomposition + 2 * d_out * d_in**2 + 2 * d_in**3 // 3


def count_solve_flops(
    group: Group,
    linears: Mapping[str, nn.Linear],
    lora_ranks: Mapping[str, int],
    decomposition: Decomposition = "output",
    device_type: str = "cpu",
) -> int:
    """Return the operations that solve every module of a group, given its sums.

    Args:
        lora_ranks: module name -> r.
        device_type: of the device that solves, "cpu" or "cuda"; their solvers differ.
    """
    total = 0
    for name in group.modules:
        linear, lora_rank = linears[name], lora_ranks[name]
        match decomposition:
            case "output":
                total += count_forming_flops(group.statistic, linear)
                total += count_eigen_flops(group.statistic, linear, lora_rank, device_type)
            case "input":
                total += count_eigh_flops(linear.in_features, lora_rank, device_type)
                total += 2 * linear.in_features**2 * lora_rank  # the checks
            case "matrix":
                total += count_svd_flops(group.statistic, linear, lora_rank, device_type)
    return total
