"""Compute initial adapter factors (A0, B0) from a module's whole weight: one function a method.

A0 is (r, d_in) and B0 is (d_out, r), both fp64. With s = alpha / r, adapter.initialise_layers
replaces the weight by `W_res = W - s B0 A0`, so that the model's output does not change. PiSSA,
MiLoRA and CorDA make `s B0 A0` a given part of W: they take s as an argument and divide both
factors by sqrt(s), as PEFT does for PiSSA and CorDA (it has no MiLoRA).

The signs of a pair of singular vectors are arbitrary. Here they are chosen so that the entry of
largest magnitude in B0's column is positive.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from astra.eigen import (
    EPS,
    choose_signs,
    draw_directions,
    make_generator,
    solve_eigenproblem,
)
from astra.errors import AstraError
from astra.svd import compute_svd

CordaMode = Literal["ipm", "kpm"]
CORDA_DAMPING = 0.01  # added to the diagonal of the moment, whose mean is scaled to 1
LORA_GA_GAMMA = 16.0  # as in the code of LoRA-GA's authors and in PEFT


def init_astra(weight: Tensor, vectors: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return A0 = V^T W and B0 = V, where V's columns are the chosen eigenvectors.

    Astra, arXiv 2602.19111; PEFT pull request 3725 has the same.

    Rows `v^T W` that are zero to rounding are set to exactly 0 if v has eigenvalue 0, so that no
    output of the module has a component along v. An eigenvalue can also be 0 because the
    calibration had too few tokens. Then the row is not small, and stays.

    Args:
        vectors: V, (d_out, r), fp64.
        values: (r,), their eigenvalues.
    """
    weight = weight.double()
    rows = vectors.T @ weight
    rms_row_norm = weight.norm() / math.sqrt(len(weight))
    is_zero = (values == 0) & (rows.norm(dim=1) < 1e-6 * rms_row_norm)
    # Adam would turn the rounding noise in these rows into updates of B of full size.
    return rows * ~is_zero[:, None], vectors


def init_haar(weight: Tensor, lora_rank: int, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Return A0 = B0^T W and B0, whose columns are a random orthonormal basis.

    A control for Astra without data: the subspace that B0 spans is uniform among all of its
    dimension, and the basis is uniform within it (the Haar measure). Eigenvectors that are chosen
    at random (eigen.select_indices) are uniform only among the eigenvectors.

    Q of a Gaussian matrix's `Q R` has this law where the diagonal of R is positive (Mezzadri, "How
    to generate random matrices from the classical compact groups", Notices of the AMS 54, 2007). The
    draw depends on (seed, module name, rank) alone.
    """
    directions = draw_directions(len(weight), lora_rank, make_generator(seed, f"{name} haar"))
    q, r = torch.linalg.qr(directions)  # on the CPU, as GPUs round in other places
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)
    b0 = (q * signs).to(weight.device)
    return b0.T @ weight.double(), b0


def init_lora(weight: Tensor, lora_rank: int, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Return A0 drawn from U(-1/sqrt(d_in), 1/sqrt(d_in)) and B0 = 0 (arXiv 2106.09685).

    The distribution is PEFT's default, Kaiming-uniform with a = sqrt(5). The draw depends on (seed,
    module name) alone, so that engines and world sizes agree.
    """
    d_out, d_in = weight.shape
    bound = 1 / math.sqrt(d_in)
    generator = make_generator(seed, name)
    uniform = torch.rand(lora_rank, d_in, generator=generator, dtype=torch.float64)
    a0 = (2 * uniform - 1) * bound
    b0 = torch.zeros(d_out, lora_rank, dtype=torch.float64, device=weight.device)
    return a0.to(weight.device), b0


def init_pissa(weight: Tensor, lora_rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return factors of W's r largest singular triplets: `s B0 A0 = U_r S_r V_r^T`.

    PiSSA, arXiv 2404.02948, as in PEFT.
    """
    u, values, v = compute_svd(weight, lora_rank)
    return _split_evenly(u, values, v, lora_rank, scaling)


def init_milora(weight: Tensor, lora_rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return factors of W's r smallest singular triplets: `s B0 A0 = U_r S_r V_r^T`.

    MiLoRA, arXiv 2406.09044. The smallest comes first.
    """
    u, values, v = compute_svd(weight, lora_rank, smallest_first=True)
    return _split_evenly(u, values, v, lora_rank, scaling)


def init_olora(weight: Tensor, lora_rank: int) -> tuple[Tensor, Tensor]:
    """Return the first r rows of R as A0 and columns of Q as B0, where `W = Q R`.

    OLoRA, arXiv 2406.01775, as in PEFT.
    """
    q, r = torch.linalg.qr(weight.double())
    q, r = q[:, :lora_rank], r[:lora_rank]
    signs = choose_signs(q)
    return r * signs[:, None], q * signs


def init_corda(
    weight: Tensor, second_moment: Tensor, lora_rank: int, scaling: float, mode: CordaMode
) -> tuple[Tensor, Tensor]:
    """Return factors with `s B0 A0 = U_r S_r V_r^T C^-1`, where `W C = U S V^T`.

    CorDA, arXiv 2406.05223. "ipm" takes the r largest singular triplets, "kpm" the r smallest, the
    smallest first. C is the second moment of the module's inputs, scaled to a mean diagonal entry
    of 1 and damped. The scale does not change B0 A0, only the norms of A0 and B0. (The authors and
    PEFT damp by the same share of the mean diagonal entry, and by more where fp32 cannot invert the
    sum. They divide each batch of inputs by its largest entry and do not scale C.)

    Args:
        second_moment: (d_in, d_in), fp64, symmetric, of any scale.

    Raises:
        AstraError: the moment is zero or not finite.
    """
    mean = second_moment.diagonal().mean()
    if not (torch.isfinite(second_moment).all() and mean > 0):
        raise AstraError(
            "its calibration moment is zero or not finite; check the model's dtype and the data"
        )
    # C = second_moment / mean + damping I
    damped = second_moment / mean
    damped.diagonal().add_(CORDA_DAMPING)
    u, values, v = compute_svd(weight.double() @ damped, lora_rank, smallest_first=mode == "kpm")
    a_times_c, b0 = _split_evenly(u, values, v, lora_rank, scaling)
    # C is symmetric: (A0 C) C^-1 = (C^-1 (A0 C)^T)^T
    return torch.linalg.solve(damped, a_times_c.T).T, b0


def init_eva(
    covariance: Tensor, d_out: int, lora_rank: int, seed: int, name: str
) -> tuple[Tensor, Tensor]:
    """Return the inputs' first r principal components as A0's rows, largest first, and B0 = 0.

    EVA, arXiv 2410.07170, as in PEFT but without its redistribution of ranks. PEFT computes the
    components by incremental PCA, which approximates them; here they are exact. The largest entry of
    each row of A0 is positive, as in PEFT.

    Args:
        covariance: (d_in, d_in), fp64, of the inputs about their mean. Here all real tokens count;
            PEFT leaves out those without a label, such as the prompt's, unless use_label_mask is off.
        seed, name: see eigen.solve_eigenproblem.
    """
    subspace = solve_eigenproblem(None, covariance, lora_rank, "largest", seed, name)
    a0 = subspace.vectors.flip(1).T
    b0 = covariance.new_zeros(d_out, lora_rank)
    return a0, b0


def init_lora_ga(gradient: Tensor, lora_rank: int) -> tuple[Tensor, Tensor]:
    """Return A0 = c V_[1..r]^T and B0 = c U_[r+1..2r], where the gradient is `U S V^T`.

    LoRA-GA, with c = d_out^(1/4) / sqrt(gamma). As in the paper (arXiv 2407.05000) and its authors'
    code, gamma = 16. PEFT takes the same singular vectors, but multiplies B0 by the singular
    values, which have the loss's units, and leaves A0 without c.

    Args:
        gradient: (d_out, d_in), of the loss with respect to W.

    Raises:
        AstraError: the gradient has fewer than 2r singular vectors, fewer than 2r that are not
            rounding noise, is zero or not finite.
    """
    num_vectors = min(gradient.shape)
    if 2 * lora_rank > num_vectors:
        raise AstraError(
            f"lora_ga takes 2 x {lora_rank} singular vectors and there are {num_vectors}; lower it",
            "rank",
        )
    if not (torch.isfinite(gradient).all() and gradient.any()):
        raise AstraError("its gradient is zero or not finite; check the model's dtype and the data")
    u, values, v = compute_svd(gradient, 2 * lora_rank)
    # n tokens give a gradient of rank n at most. Its sum is made in fp64, where products of a model's
    # numbers are exact: the bound is that of fp64, whatever the model's dtype.
    num_found = int((values > max(gradient.shape) * EPS * values[0]).sum())
    if num_found < 2 * lora_rank:
        raise AstraError(
            f"lora_ga takes 2 x {lora_rank} singular vectors and its gradient has {num_found}, the "
            "rest being rounding; lower it, or calibrate on more examples",
            "rank",
        )
    factor = len(gradient) ** 0.25 / math.sqrt(LORA_GA_GAMMA)
    a0 = factor * v[:, :lora_rank].T
    b0 = factor * u[:, lora_rank : 2 * lora_rank]
    return a0, b0


def _split_evenly(
    u: Tensor, values: Tensor, v: Tensor, lora_rank: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return (A0, B0) with `s B0 A0 = U_r S_r V_r^T`, made of r singular triplets.

    Either factor gets the square root of each singular value over s.
    """
    roots = (values[:lora_rank] / scaling).sqrt()
    a0 = roots[:, None] * v[:, :lora_rank].T
    b0 = u[:, :lora_rank] * roots
    return a0, b0
