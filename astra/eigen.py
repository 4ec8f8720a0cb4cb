"""The r eigenvectors of one output second moment that `eigen_select` names, exactly and checked before use."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from scipy.linalg import LinAlgError, eigh_tridiagonal, eigvalsh_tridiagonal, lapack
from torch import Tensor

from astra.errors import AstraError
from astra.output_moment import Basis

EigenSelect = Literal["smallest", "largest", "middle", "random"]
EPS = torch.finfo(torch.float64).eps
SMALL = 64  # below it one dense call is faster


@dataclass(frozen=True)
class Subspace:
    """r orthonormal eigenvectors of one module's output second moment, columns in ascending order of eigenvalue."""

    vectors: Tensor  # (d_out, r), fp64
    values: Tensor  # (r,), fp64, exactly 0 where the eigenvalue is zero to rounding
    spectrum: Tensor  # (d_out,), fp64, all eigenvalues, ascending, with the same zeros
    checks: Tensor  # (3,), fp64, see Checks


class Checks(NamedTuple):
    """How far a solution is from exact, in units of what is let pass: each at most 1, or the solution is not used."""

    orthonormality: float  # max |V^T V - I| over 100 d eps64
    residual: float  # largest |C v - lambda v| over 100 d eps64 tr(C)
    energy: (
        float  # |tr(V^T C V) - sum of the r eigenvalues named| over 1 % of it + 10 d eps64 tr(C)
    )


Eigenpairs = tuple[Tensor, Callable[[int, int], Tensor]]
"""All eigenvalues, ascending, and a function: the eigenvectors of indices from i up to j, as columns."""


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
            raise AstraError(
                f"adapter.eigen_select: {select!r} is none of {', '.join(get_args(EigenSelect))}"
            )
    return torch.arange(start, start + rank)


def canonical_signs(vectors: Tensor) -> Tensor:
    """Each column times +-1, so that its entry of largest magnitude is positive."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def tridiagonal_eigenpairs(matrix: Tensor) -> Eigenpairs:
    """By LAPACK on the CPU: one reduction to tridiagonal form gives every eigenvalue, and only the wanted vectors.

    sytrd, then sterf or stemr (MRRR) on the tridiagonal matrix, and ormqr to turn the wanted vectors back.
    """
    work, info = lapack.dsytrd_lwork(len(matrix), lower=1)
    # A symmetric matrix is its own transpose: LAPACK's column order costs no copy.
    reflectors, diagonal, beside, tau, info = lapack.dsytrd(
        matrix.numpy().T, lower=1, lwork=int(work)
    )
    if info:
        raise LinAlgError(f"sytrd: info {info}")

    def vectors(start: int, end: int) -> Tensor:
        _, turned = eigh_tridiagonal(
            diagonal,
            beside,
            select="i",
            select_range=(start, end - 1),
            lapack_driver="stemr",
            check_finite=False,
        )
        below = turned[1:]
        work, info = lapack.dormqr("L", "N", reflectors[1:, :-1], tau, below, lwork=-1)[1:]
        turned[1:], _, info = lapack.dormqr(
            "L", "N", reflectors[1:, :-1], tau, below, lwork=int(work[0])
        )
        if info:
            raise LinAlgError(f"ormqr: info {info}")
        return torch.from_numpy(turned)

    return torch.from_numpy(eigvalsh_tridiagonal(diagonal, beside, check_finite=False)), vectors


def dense_eigenpairs(matrix: Tensor) -> Eigenpairs:
    """By the device's own solver, all vectors at once: the way on GPUs, and where the other one fails."""
    values, vectors = torch.linalg.eigh(matrix)
    return values, lambda start, end: vectors[:, start:end]


def _directions(size: int, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Fixed Gaussian columns, (size, count); the first of them do not depend on `count`."""
    return torch.randn(count, size, generator=generator, dtype=torch.float64).T.to(device)


def _project(directions: Tensor, onto: Callable[[Tensor], Tensor]) -> Tensor:
    """Orthonormal columns from `directions` within the space that `onto` projects to.

    In a degenerate null space any basis is optimal; eigensolvers return rounding noise, different on every machine.
    Fixed directions, projected, give a choice that depends smoothly on the null space alone.
    """
    for _ in range(
        2
    ):  # the second projection removes what the rounding of the first left (Parlett: twice is enough)
        directions = torch.linalg.qr(onto(directions)).Q
    return directions


def null_vectors(basis: Basis, count: int, seed: int, name: str) -> Tensor:
    """`count` orthonormal vectors outside of the range of `basis`, (size, count): whatever the moment, C v = 0."""
    directions = _directions(
        len(basis.reflectors), count, named_generator(seed, f"{name} outside"), basis.tau.device
    )
    return basis.complement(directions)


def solve(
    basis: Basis | None, small: Tensor, rank: int, select: EigenSelect, seed: int, name: str
) -> Subspace:
    """r eigenpairs of `C = basis small basis^T` (see factor.output_moment).

    Zero eigenvalues come first: those outside of `basis`, then those of `small` up to `min(1, 10 / r) d eps64 tr(C)`,
    so that r of them stay within the tolerance of the energy check. `name` seeds the random choices and is used in
    messages.

    Raises:
        AstraError: rank above d_out, moments that are not finite, or a result that fails the checks.
    """
    size = small.shape[0] if basis is None else len(basis.reflectors)
    if rank > size:
        raise AstraError(f"adapter.rank: {rank} is above the {size} outputs of {name}; lower it")
    if not torch.isfinite(small).all():
        raise AstraError(
            f"{name}: its calibration moment is not finite; check the model's dtype and the data"
        )
    indices = select_indices(select, size, rank, named_generator(seed, name))
    failure = ""
    for eigenpairs in (tridiagonal_eigenpairs, dense_eigenpairs)[
        small.is_cuda or len(small) < SMALL :
    ]:
        try:
            subspace = _solve(basis, small, indices, eigenpairs(small), seed, name)
        except (LinAlgError, torch.linalg.LinAlgError) as error:
            failure = str(error)
            continue
        checks = Checks(*subspace.checks.tolist())
        if max(checks) <= 1:
            return subspace
        failure = f"inexact, in units of what is let pass: {checks}"
    raise AstraError(f"{name}: its eigenproblem could not be solved: {failure}")


def _solve(
    basis: Basis | None,
    small: Tensor,
    indices: Tensor,
    eigenpairs: Eigenpairs,
    seed: int,
    name: str,
) -> Subspace:
    spectrum, vectors_of = eigenpairs
    rank, k = len(indices), len(small)
    outside = 0 if basis is None else basis.codimension
    size = outside + k
    trace = spectrum.clamp(min=0).sum()
    zeros = int((spectrum <= min(1.0, 10 / rank) * size * EPS * trace).sum())
    spectrum[:zeros] = 0

    parts = []
    if num_outside := int((indices < outside).sum()):
        parts.append(null_vectors(basis, num_outside, seed, name))
    num_null = int(((indices >= outside) & (indices < outside + zeros)).sum())
    wanted = indices[num_outside + num_null :] - outside
    few_zeros = zeros <= k - zeros
    needed = [(int(wanted[0]), int(wanted[-1]) + 1)] if len(wanted) else []
    needed += [(0, zeros) if few_zeros else (zeros, k)] if num_null else []
    # One call for all: vectors of close eigenvalues from separate calls need not be orthogonal.
    start = min((first for first, _ in needed), default=0)
    found = vectors_of(start, max(end for _, end in needed)) if needed else None
    within = []
    if num_null:
        directions = _directions(k, num_null, named_generator(seed, f"{name} within"), small.device)
        if few_zeros:
            null = found[:, :zeros]
            within.append(_project(directions, lambda x: null @ (null.T @ x)))
        else:
            within.append(_project(directions, lambda x: x - found @ (found.T @ x)))
    if len(wanted):
        within.append(found[:, (wanted - start).to(small.device)])
    if within:
        vectors = torch.cat(within, 1)
        parts.append(vectors if basis is None else basis.times(vectors))
    vectors = canonical_signs(torch.cat(parts, 1))
    spectrum = torch.cat([spectrum.new_zeros(outside), spectrum])
    values = spectrum[indices.to(small.device)]
    return Subspace(vectors, values, spectrum, _check(vectors, values, basis, small, trace))


def _check(
    vectors: Tensor, values: Tensor, basis: Basis | None, small: Tensor, trace: Tensor
) -> Tensor:
    """The tensor of Checks."""
    size, rank = vectors.shape
    inner = vectors.T @ vectors - torch.eye(rank, dtype=torch.float64, device=vectors.device)
    image = (
        small @ vectors if basis is None else basis.times(small @ basis.transposed_times(vectors))
    )
    residual = (image - vectors * values).norm(dim=0).max()
    energy = ((vectors * image).sum() - values.sum()).abs()
    rounding = size * EPS * trace
    tiny = torch.finfo(torch.float64).tiny  # where the whole moment is zero, so is every difference
    return torch.stack(
        [
            inner.abs().max() / (100 * size * EPS),
            residual / (100 * rounding + tiny),
            energy / (0.01 * values.sum() + 10 * rounding + tiny),
        ]
    )
