"""Compute the r largest or the r smallest singular triplets of a matrix, by device.

On CPUs LAPACK computes all triplets. On GPUs PyTorch's default (Jacobi, gesvdj) takes minutes for a
matrix of a large model, so large ones are solved by their Gram matrix, which is checked:

1. eigenvectors of `M^T M`, (n, n), n being the smaller side, in fp64. They span the wanted right
   singular vectors; but an eigenvalue is the square of a singular value, and so one below
   sqrt(n eps) of the largest is lost in rounding.
2. within that span, the triplets of `M V`, (m, r), by QR and a small SVD (Rayleigh-Ritz), which
   loses nothing.
3. the check: U and V orthonormal, `M v = s u` and `M^T u = s v`, to the rounding of fp64, and no
   singular value below the bound of step 1.

What fails the check, mostly tails of ill-conditioned matrices, is solved by cuSOLVER's gesvd, and
what fails there by LAPACK on the CPU.
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from astra.eigen import EPS, choose_signs
from astra.errors import FallbackWarning

GRAM_FROM = 256  # rows of the smaller side; below it any SVD is fast


class Triplets(NamedTuple):
    """Singular triplets, in descending order of the singular values."""

    u: Tensor  # (rows, r), fp64
    values: Tensor  # (r,), fp64
    v: Tensor  # (columns, r), fp64


Decompose = Callable[[Tensor, int, bool], Triplets]
"""(matrix, r, whether the smallest are wanted) -> the r triplets at that end."""


def compute_svd(
    matrix: Tensor, count: int, smallest_first: bool = False, device_type: str | None = None
) -> Triplets:
    """Return the first `count` singular triplets in descending, or ascending, order of the values.

    The signs of U's columns are canonical, and V's columns have the signs that go with them.

    Args:
        matrix: any dtype; computed in fp64.
        count: at most the smaller side.
        device_type: chooses the solvers; the matrix's own by default.

    Raises:
        torch.linalg.LinAlgError: no solver converges.
    """
    matrix = matrix.double()
    u, values, v = _decompose(matrix, count, smallest_first, device_type or matrix.device.type)
    signs = choose_signs(u)
    triplets = Triplets(u * signs, values, v * signs)
    if smallest_first:
        return Triplets(*(tensor.flip(-1) for tensor in triplets))
    return triplets


def choose_svds(device_type: str, size: int) -> list[Decompose]:
    """Return the solvers to try, the first that succeeds counts.

    Args:
        device_type: "cpu" or "cuda".
        size: of the matrix's smaller side.
    """
    if device_type != "cuda":
        return [decompose_whole]
    if size < GRAM_FROM:
        return [decompose_whole, decompose_on_cpu]
    return [decompose_gram, decompose_gesvd, decompose_on_cpu]


def _decompose(matrix: Tensor, count: int, smallest: bool, device_type: str) -> Triplets:
    """Return the triplets of the first solver that succeeds, and warn where it is not the first."""
    solvers = choose_svds(device_type, min(matrix.shape))
    for i, decompose in enumerate(solvers[:-1]):
        try:
            return decompose(matrix, count, smallest)
        # cuSOLVER reports most failures as plain RuntimeErrors, and a lack of memory is one too.
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0][:150]
            warnings.warn(
                f"singular vectors: {LABELS[decompose]} failed ({reason}); taking "
                f"{LABELS[solvers[i + 1]]}, which is slower",
                FallbackWarning,
                stacklevel=2,
            )
    return solvers[-1](matrix, count, smallest)


def decompose_whole(matrix: Tensor, count: int, smallest: bool) -> Triplets:
    """Compute all triplets on the matrix's device, with PyTorch's default there."""
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    return _select(u, values, vh, count, smallest)


def decompose_on_cpu(matrix: Tensor, count: int, smallest: bool) -> Triplets:
    """Compute all triplets by LAPACK on the CPU."""
    triplets = decompose_whole(matrix.cpu(), count, smallest)
    return Triplets(*(tensor.to(matrix.device) for tensor in triplets))


def decompose_gesvd(matrix: Tensor, count: int, smallest: bool) -> Triplets:
    """Compute all triplets by cuSOLVER's gesvd. Raises LinAlgError if the check fails."""
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False, driver="gesvd")
    triplets = _select(u, values, vh, count, smallest)
    _check(matrix, triplets, values[0])
    return triplets


def decompose_gram(matrix: Tensor, count: int, smallest: bool) -> Triplets:
    """Compute triplets by the Gram matrix of the smaller side; see the head of this file.

    Raises:
        torch.linalg.LinAlgError: the check fails.
    """
    if matrix.shape[0] < matrix.shape[1]:
        u, values, v = decompose_gram(matrix.T, count, smallest)
        return Triplets(v, values, u)
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix.T @ matrix)
    span = eigenvectors[:, :count] if smallest else eigenvectors[:, -count:]
    q, r = torch.linalg.qr(matrix @ span)
    inner_u, values, inner_vh = torch.linalg.svd(r)
    triplets = Triplets(q @ inner_u, values, span @ inner_vh.T)
    largest = eigenvalues[-1].clamp(min=0).sqrt()
    if not values[-1] >= math.sqrt(len(eigenvalues) * EPS) * largest:
        raise torch.linalg.LinAlgError("singular values below what a Gram matrix resolves")
    _check(matrix, triplets, largest)
    return triplets


LABELS = {  # of solvers, in warnings
    decompose_whole: "cuSOLVER",
    decompose_gram: "the Gram matrix",
    decompose_gesvd: "cuSOLVER's gesvd",
    decompose_on_cpu: "LAPACK on the CPU",
}


def _select(u: Tensor, values: Tensor, vh: Tensor, count: int, smallest: bool) -> Triplets:
    """Return `count` of all triplets, which are in descending order, at one end."""
    chosen = slice(len(values) - count, None) if smallest else slice(count)
    return Triplets(u[:, chosen], values[chosen], vh[chosen].T)


def _check(matrix: Tensor, triplets: Triplets, largest: Tensor) -> None:
    """Raise LinAlgError if the triplets are not exact to fp64's rounding.

    The tolerance is that of eigen.Checks: 100 d eps, times the largest singular value for residuals.
    """
    u, values, v = triplets
    tolerance = 100 * max(matrix.shape) * EPS
    identity = torch.eye(len(values), dtype=values.dtype, device=values.device)
    errors = torch.stack(
        [
            (u.T @ u - identity).abs().max(),
            (v.T @ v - identity).abs().max(),
            (matrix @ v - u * values).norm(dim=0).max() / largest,
            (matrix.T @ u - v * values).norm(dim=0).max() / largest,
        ]
    )
    if not (errors <= tolerance).all():  # also where one is nan
        raise torch.linalg.LinAlgError("singular vectors are not exact enough")
