"""Initial adapter factors: one function for each method, from a module's whole weight to fp64 (A0, B0).

A0 is (r, d_in), B0 is (d_out, r). The frozen weight becomes `W - s B0 A0` for every method (see adapter.initialise).
"""

import math

import torch
from torch import Tensor

from astra.eigen import Subspace, named_generator


def astra(weight: Tensor, subspace: Subspace) -> tuple[Tensor, Tensor]:
    """B0 = V, A0 = V^T W (arXiv 2602.19111, PEFT pull request 3725).

    Where an eigenvalue is zero the row of A0 is exactly 0: rounding noise there, at 1e-9, would be turned by Adam into
    full-size updates of B.
    """
    vectors = subspace.vectors
    rows = vectors.T @ weight.double()
    return rows * (subspace.values != 0)[:, None], vectors


def lora(weight: Tensor, rank: int, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """A0 Kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(d_in), 1/sqrt(d_in)), as PEFT's default; B0 = 0.

    Drawn from (seed, module name), so that engines and world sizes agree.
    """
    d_out, d_in = weight.shape
    bound = 1 / math.sqrt(d_in)
    uniform = torch.rand(rank, d_in, generator=named_generator(seed, name), dtype=torch.float64)
    rows = (2 * uniform - 1) * bound
    return rows.to(weight.device), torch.zeros(d_out, rank, dtype=torch.float64, device=weight.device)
