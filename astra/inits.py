"""Initial adapter factors: one function for each method, from a module's whole weight to fp64 (A0, B0).

A0 is (r, d_in), B0 is (d_out, r). The frozen weight becomes `W - s B0 A0` for every method (see adapter.initialise).
Where a method's own code makes `s B0 A0` a given part of W (PiSSA, MiLoRA, CorDA), its factors are divided by sqrt(s),
as PEFT does; the others' do not depend on s.

Singular vectors have no sign of their own: that with which a column of B0 has its largest entry positive is taken.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from astra.eigen import Subspace, canonical_signs, named_generator, solve
from astra.errors import AstraError

CordaMode = Literal["ipm", "kpm"]
GAMMA = 16.0  # LoRA-GA's scale, as in its authors' code and PEFT
DAMPING = 0.01  # CorDA's, of the mean diagonal entry of the moment


def astra(weight: Tensor, subspace: Subspace) -> tuple[Tensor, Tensor]:
    """B0 = V, A0 = V^T W (arXiv 2602.19111, PEFT pull request 3725).

    A vector that the weight cannot reach has a zero row of A0, exactly: rounding noise there would be turned by Adam
    into full-size updates of B. It has a zero eigenvalue too, but so have vectors that only the calibration's tokens
    did not reach, whose rows stay.
    """
    vectors, weight = subspace.vectors, weight.double()
    rows = vectors.T @ weight
    typical = weight.norm() / math.sqrt(len(weight))
    unreached = (subspace.values == 0) & (rows.norm(dim=1) < 1e-6 * typical)
    return rows * ~unreached[:, None], vectors


def lora(weight: Tensor, rank: int, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """A0 Kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(d_in), 1/sqrt(d_in)), as PEFT's default; B0 = 0.

    Drawn from (seed, module name), so that engines and world sizes agree.
    """
    d_out, d_in = weight.shape
    bound = 1 / math.sqrt(d_in)
    uniform = torch.rand(rank, d_in, generator=named_generator(seed, name), dtype=torch.float64)
    rows = (2 * uniform - 1) * bound
    return rows.to(weight.device), torch.zeros(
        d_out, rank, dtype=torch.float64, device=weight.device
    )


def pissa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The r largest singular triplets of W: `s B0 A0 = U_r S_r V_r^T` (arXiv 2404.02948, PEFT's pissa)."""
    u, values, v = _svd(weight)
    return _halves(u[:, :rank], values[:rank] / scaling, v[:, :rank])


def milora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The r smallest singular triplets of W, the smallest first, otherwise as pissa (arXiv 2406.09044)."""
    u, values, v = (part.flip(-1) for part in _svd(weight))
    return _halves(u[:, :rank], values[:rank] / scaling, v[:, :rank])


def olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first r columns of Q and rows of R of `W = Q R` (arXiv 2406.01775, PEFT's olora)."""
    q, rows = torch.linalg.qr(weight.double())
    columns = canonical_signs(q[:, :rank])
    return rows[:rank] * (columns * q[:, :rank]).sum(0).sign()[:, None], columns


def corda(
    weight: Tensor, second: Tensor, rank: int, scaling: float, mode: CordaMode
) -> tuple[Tensor, Tensor]:
    """Singular triplets of `W C = U S V^T`: `s B0 A0 = U_r S_r V_r^T C^-1` (arXiv 2406.05223, PEFT's corda).

    ipm takes the r largest, kpm the r smallest, the smallest first. C is the damped second moment of the layer's
    inputs, scaled to a trace of d_in: B0 A0 does not depend on its scale, only how it is shared out between the two.
    (PEFT instead divides each batch of inputs by its largest entry before it sums.)

    Args:
        second: (d_in, d_in), symmetric, of any scale.

    Raises:
        AstraError: the moment is not finite, or is zero.
    """
    mean = second.diagonal().mean()
    if not (torch.isfinite(second).all() and mean > 0):
        raise AstraError(
            "its calibration moment is zero or not finite; check the model's dtype and the data"
        )
    damped = second / mean
    damped.diagonal().add_(DAMPING)
    u, values, v = _svd(weight.double() @ damped)
    if mode == "kpm":
        u, values, v = (part.flip(-1) for part in (u, values, v))
    a0, b0 = _halves(u[:, :rank], values[:rank] / scaling, v[:, :rank])
    return torch.linalg.solve(damped, a0.T).T, b0


def eva(covariance: Tensor, d_out: int, rank: int, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """A0's rows are the r principal components of the layer's inputs, the largest first; B0 = 0 (arXiv 2410.07170).

    That is PEFT's eva without its redistribution of ranks, and exact: PEFT's incremental PCA truncates as it goes.

    Args:
        covariance: (d_in, d_in), of the inputs about their mean. seed, name: see eigen.solve.
    """
    vectors = solve(None, covariance, rank, "largest", seed, name).vectors
    return vectors.flip(1).T, covariance.new_zeros(d_out, rank)


def lora_ga(gradient: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """With the gradient's `U S V^T`: A0 = c V_[1..r]^T and B0 = c U_[r+1..2r], c = d_out^(1/4) / sqrt(gamma).

    As the paper (arXiv 2407.05000) and its authors' code have it, gamma = 16. PEFT's lora_ga has the same singular
    vectors, but multiplies B0 by the gradient's singular values, so by the loss's units, and leaves A0 without c.

    Args:
        gradient: (d_out, d_in), of the loss with respect to W.

    Raises:
        AstraError: the gradient has less than 2r singular vectors, is zero or not finite.
    """
    if 2 * rank > min(gradient.shape):
        raise AstraError(
            f"adapter.rank: lora_ga takes 2 x {rank} singular vectors and there are {min(gradient.shape)}"
        )
    if not (torch.isfinite(gradient).all() and gradient.any()):
        raise AstraError("its gradient is zero or not finite; check the model's dtype and the data")
    u, _, v = _svd(gradient)
    scale = len(gradient) ** 0.25 / math.sqrt(GAMMA)
    return scale * v[:, :rank].T, scale * canonical_signs(u[:, rank : 2 * rank])


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, values, V) in fp64, descending, V's columns being right singular vectors; U's signs are canonical."""
    u, values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    columns = canonical_signs(u)
    return columns, values, vh.T * (columns * u).sum(0).sign()


def _halves(u: Tensor, values: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`U S V^T` as (A0, B0), half of each singular value in either."""
    return values.sqrt()[:, None] * v.T, u * values.sqrt()
