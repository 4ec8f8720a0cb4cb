"""Initial adapter factors: one function for each method, from a module's whole weight to fp64 (A0, B0).

A0 is (r, d_in), B0 is (d_out, r). The frozen weight becomes `W - s B0 A0` for every method (see adapter.initialise).
"""

import math

import torch
from torch import Tensor

from astra.eigen import Subspace, named_generator


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
    return rows.to(weight.device), torch.zeros(d_out, rank, dtype=torch.float64, device=weight.device)
