"""The r eigenvectors of one output second moment that `eigen_select` names, exactly and checked before use."""

import hashlib
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from astra.errors import AstraError

EigenSelect = Literal["smallest", "largest", "middle", "random"]
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Subspace:
    """r orthonormal eigenvectors of one module's output second moment, columns in ascending order of eigenvalue."""

    vectors: Tensor  # (d_out, r), fp64
    values: Tensor  # (r,), fp64, exactly 0 where the eigenvalue is zero to rounding


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on (seed, module name) alone, so that every rank and engine draws the same."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


def select_indices(select: EigenSelect, size: int, rank: int, generator: torch.Generator) -> Tensor:
    """Indices into the ascending spectrum, ascending: contract of `eigen_select`.

    smallest: the first r; largest: the last r; middle: r from floor((size - r) / 2); random: r distinct ones.
    """
    match select:
        case "smallest":
            start = 0
        case "largest":
            start = size - rank
        case "middle":
            start = (size - rank) // 2
        case "random":
            return torch.randperm(size, generator=generator)[:rank].sort().values
        case _:
            raise AstraError(f"adapter.eigen_select: {select!r} is none of {', '.join(get_args(EigenSelect))}")
    return torch.arange(start, start + rank)


def canonical_signs(vectors: Tensor) -> Tensor:
    """Each column times +-1, so that its entry of largest magnitude is positive."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def _null_vectors(range_basis: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` orthonormal vectors orthogonal to `range_basis`, (d_out, p).

    In a degenerate null space any basis is optimal; `eigh` would return rounding noise, different on every machine.
    Taken instead: fixed Gaussian directions, projected onto the null space and orthonormalised, so that the choice
    depends smoothly on the null space alone.
    """
    size = range_basis.shape[0]
    directions = torch.randn(size, count, generator=generator, dtype=torch.float64).to(range_basis.device)
    for _ in range(2):  # the second projection removes what the rounding of the first left (Parlett: twice is enough)
        directions = torch.linalg.qr(directions - range_basis @ (range_basis.T @ directions)).Q
    return directions


def solve(basis: Tensor | None, small: Tensor, rank: int, select: EigenSelect, seed: int, name: str) -> Subspace:
    """r eigenpairs of `C = basis small basis^T` (see moments.factor).

    Eigenvalues of `small` up to `min(1, 10 / r) d eps64 tr(C)` count as zero: r of them stay within the tolerance of
    the energy check. `name` seeds the random choices and is used in messages.

    Raises:
        AstraError: rank above d_out, moments that are not finite, or a result that fails the checks.
    """
    size = small.shape[0] if basis is None else basis.shape[0]
    if rank > size:
        raise AstraError(f"adapter.rank: {rank} is above the {size} outputs of {name}; lower it")
    if not torch.isfinite(small).all():
        raise AstraError(f"{name}: its calibration moment is not finite; check the model's dtype and the data")
    spectrum, eigenvectors = torch.linalg.eigh(small)
    trace = spectrum.clamp(min=0).sum()
    zero = spectrum <= min(1.0, 10 / rank) * size * EPS * trace
    positive, range_vectors = spectrum[~zero], eigenvectors[:, ~zero]
    if basis is not None:
        range_vectors = basis @ range_vectors
    num_null = size - len(positive)

    generator = named_generator(seed, name)
    indices = select_indices(select, size, rank, generator)
    from_null = int((indices < num_null).sum())
    from_range = (indices[from_null:] - num_null).to(small.device)
    vectors = range_vectors[:, from_range]
    if from_null:
        vectors = torch.cat([_null_vectors(range_vectors, from_null, generator), vectors], 1)
    values = torch.cat([positive.new_zeros(from_null), positive[from_range]])
    subspace = Subspace(canonical_signs(vectors), values)
    _check(subspace, basis, small, trace, name)
    return subspace


def _check(subspace: Subspace, basis: Tensor | None, small: Tensor, trace: Tensor, name: str) -> None:
    """Orthonormality and eigen-residual, in units of what fp64 rounding explains; an error otherwise."""
    vectors, values = subspace.vectors, subspace.values
    size = vectors.shape[0]
    inner = vectors.T @ vectors - torch.eye(vectors.shape[1], dtype=torch.float64, device=vectors.device)
    if inner.abs().max() > 100 * size * EPS:
        raise AstraError(f"{name}: eigenvectors are not orthonormal (off by {inner.abs().max():.1e})")
    image = small @ vectors if basis is None else basis @ (small @ (basis.T @ vectors))
    residual = (image - vectors * values).norm(dim=0).max()
    if residual > 100 * size * EPS * trace:
        raise AstraError(f"{name}: eigen-residual {residual:.1e} is above rounding for a moment of trace {trace:.1e}")
