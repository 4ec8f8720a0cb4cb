"""Choose r eigenvectors of one module's output second moment, and check them before they are used.

`C = 1/n sum_t y_t y_t^T` is the second moment of a module's outputs y over n tokens, symmetric and
of shape (d_out, d_out). Its eigenvectors are numbered 0 to d_out - 1 in ascending order of
eigenvalue. The columns of V, (d_out, r), are r of them, and `EigenSelect` names which: the paper
(arXiv 2602.19111) takes the smallest, its authors' code the largest.

All arithmetic is fp64. Moments of trained models have condition numbers of 1e7 and more. In fp32,
"smallest" eigenvectors can then have hundreds of times the least possible energy, `tr(V^T C V)`.

C is passed as `C = Q core Q^T` (see output_moment). Q, (d_out, k), has orthonormal columns, so an
eigenvector u of `core` gives the eigenvector `Q u` of C. Every vector orthogonal to Q's columns is
an eigenvector of C with eigenvalue 0. There are such vectors if d_out is above k, which is d_in, or
d_in + 1 with a bias.

Null spaces are therefore common, and any basis of a null space is as good as another. An
eigensolver returns a basis made of rounding noise, which differs from machine to machine. This
module returns null vectors that depend on nothing but the null space, the seed and the module's
name.
"""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from scipy.linalg import LinAlgError
from torch import Tensor

from astra import lapack
from astra.errors import AstraError, FallbackWarning
from astra.output_moment import Basis

EigenSelect = Literal["smallest", "largest", "middle", "random"]
EPS = torch.finfo(torch.float64).eps
TINY = torch.finfo(torch.float64).tiny
# Rows above which cuSOLVER is reported to fail, about (JuliaGPU/CUDA.jl#2908).
CUSOLVER_ROWS = 23_000
DENSE_BELOW = 64  # rows; for a smaller matrix one dense call is faster than the tridiagonal form


@dataclass(frozen=True)
class Subspace:
    """r orthonormal eigenvectors of one module's C, in ascending order of eigenvalue."""

    vectors: Tensor  # (d_out, r), fp64: V, one eigenvector a column
    values: Tensor  # (r,), fp64: their eigenvalues, exactly 0 where zero to rounding
    spectrum: Tensor  # (d_out,), fp64: all eigenvalues, ascending, with the same exact zeros
    checks: Tensor  # (3,), fp64: the fields of Checks


class Checks(NamedTuple):
    """Errors of a solution, each divided by its tolerance: a value above 1 refuses the solution.

    d is d_out, eps is fp64's epsilon, v and lambda are the returned eigenpairs. Norms of vectors
    are Euclidean.
    """

    orthonormality: float  # max_ij |(V^T V - I)_ij| / (100 d eps)
    residual: float  # max over v of |C v - lambda v| / (100 d eps tr(C))
    energy: float  # |tr(V^T C V) - sum lambda| / (0.01 sum lambda + 10 d eps tr(C))


Eigenpairs = tuple[Tensor, Callable[[int, int], Tensor]]
"""All eigenvalues of a symmetric matrix, ascending, and a function that computes eigenvectors.

The function takes (start, end) and returns the eigenvectors numbered start to end - 1, as columns.
"""


def make_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator seeded by (seed, module name): all ranks and engines draw the same."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


def draw_directions(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Return Gaussian columns, (size, count), fp64, on the CPU."""
    # Drawn column by column: a larger `count` only appends columns, so the null vectors for a
    # smaller r are the first of those for a larger r, and a calibration for one serves the other.
    # (Exactly so where `size` is a multiple of 16: of other amounts torch.randn draws the last 16
    # numbers anew, which gives other null vectors, as good.)
    return torch.randn(count, size, generator=generator, dtype=torch.float64).T


def select_indices(
    select: EigenSelect, size: int, lora_rank: int, generator: torch.Generator
) -> Tensor:
    """Return the numbers of the eigenvectors that `select` names, (r,), int64, ascending.

    Of `size` eigenvectors, "smallest" names the first r, "largest" the last r, "middle" the r that
    start at number floor((size - r) / 2), and "random" r different ones drawn from `generator`.

    Args:
        lora_rank: r.

    Raises:
        AstraError: `select` is none of these.
    """
    match select:
        case "smallest":
            start = 0
        case "largest":
            start = size - lora_rank
        case "middle":
            start = (size - lora_rank) // 2
        case "random":
            order = torch.randperm(size, generator=generator)
            return order[:lora_rank].sort().values
        case _:
            choices = ", ".join(get_args(EigenSelect))
            raise AstraError(f"{select!r} is none of {choices}", "eigen_select")
    return torch.arange(start, start + lora_rank)


def choose_signs(vectors: Tensor) -> Tensor:
    """Return +1 or -1 for each column: times it, the column's entry of largest magnitude is positive.

    (columns,). Where the columns belong to a product, what they are multiplied by gets the same signs.
    """
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).squeeze(0)
    return torch.where(largest < 0, -1.0, 1.0)


def decompose_tridiagonal(matrix: Tensor) -> Eigenpairs:
    """Return the eigenpairs of a CPU matrix, computing only the eigenvectors that are asked for.

    LAPACK's sytrd reduces the matrix to tridiagonal form, `matrix = H T H^T`. stevd, which without
    vectors is sterf, gives all eigenvalues of T, stemr (MRRR) the wanted eigenvectors of T, and
    ormqr multiplies them by H. Other threads of Python run meanwhile (astra.lapack).

    Raises:
        LinAlgError: a LAPACK routine fails.
    """
    # LAPACK stores by columns, PyTorch by rows. `matrix` is symmetric, so its transpose is the same
    # matrix in LAPACK's order. sytrd works on a copy: the checks need `matrix` again.
    reflectors, diagonal, off_diagonal, tau = lapack.reduce_to_tridiagonal(matrix.numpy().T)

    def compute_vectors(start: int, end: int) -> Tensor:
        if start == end:
            return matrix.new_empty(len(matrix), 0)
        vectors = lapack.compute_eigenvectors(diagonal, off_diagonal, start, end)
        return torch.from_numpy(lapack.multiply_reflectors(reflectors, tau, vectors))

    values = lapack.compute_eigenvalues(diagonal, off_diagonal)
    return torch.from_numpy(values), compute_vectors


def decompose_dense(matrix: Tensor) -> Eigenpairs:
    """Return the eigenpairs from torch.linalg.eigh: all vectors, on the matrix's own device.

    Raises:
        torch.linalg.LinAlgError: LAPACK or cuSOLVER fails.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except RuntimeError as error:
        # cuSOLVER reports most failures as plain RuntimeErrors, and a lack of memory is one too.
        raise torch.linalg.LinAlgError(str(error)) from error
    return values, lambda start, end: vectors[:, start:end]


def _move_to_cpu(decompose: Callable[[Tensor], Eigenpairs]) -> Callable[[Tensor], Eigenpairs]:
    """Return `decompose` run on the CPU, its results moved to the matrix's device."""

    def decompose_on_cpu(matrix: Tensor) -> Eigenpairs:
        values, compute_vectors = decompose(matrix.cpu())
        return (
            values.to(matrix.device),
            lambda start, end: compute_vectors(start, end).to(matrix.device),
        )

    return decompose_on_cpu


def choose_decompositions(device_type: str, size: int) -> list[Callable[[Tensor], Eigenpairs]]:
    """Return the solvers to try, each where the one before fails or its vectors fail the checks.

    On GPUs the first is cuSOLVER's syevd, up to CUSOLVER_ROWS rows. It fails on some matrices, so
    the CPU's solvers follow.

    Args:
        device_type: "cpu" or "cuda".
        size: rows of the matrix.
    """
    if device_type == "cuda":
        on_cpu = [_move_to_cpu(decompose) for decompose in choose_decompositions("cpu", size)]
        return [decompose_dense, *on_cpu] if size <= CUSOLVER_ROWS else on_cpu
    if size < DENSE_BELOW:
        return [decompose_dense]
    return [decompose_tridiagonal, decompose_dense]


def solve_eigenproblem(
    basis: Basis | None,
    core: Tensor,
    lora_rank: int,
    select: EigenSelect,
    seed: int,
    name: str,
    device_type: str | None = None,
) -> Subspace:
    """Return r eigenpairs of one module's `C = Q core Q^T`, checked.

    Eigenvalues are in ascending order, so zeros come first: d_out - k of them for the complement of
    Q's columns, then the eigenvalues of `core` that are at most `min(1, 10 / r) d eps tr(C)`, which
    count as zero. Any r eigenvalues below this bound sum to at most 10 d eps tr(C), which the
    energy check tolerates.

    Args:
        basis: Q, (d_out, k); None for the identity.
        core: (k, k), fp64, symmetric.
        lora_rank: r, the number of eigenvectors.
        select: which eigenvectors; see select_indices.
        seed: for the choice of null vectors and of random eigenvectors, together with `name`.
        name: of the module; also used in messages.
        device_type: chooses the solvers; that of `core` by default.

    Raises:
        AstraError: r is above d_out, `core` is not finite, or the solution fails its checks.
    """
    size = core.shape[0] if basis is None else len(basis.reflectors)
    if lora_rank > size:
        raise AstraError(f"{lora_rank} is above the {size} outputs of {name}; lower it", "rank")
    if not torch.isfinite(core).all():
        raise AstraError(
            f"{name}: its calibration moment is not finite; check the model's dtype and the data"
        )
    indices = select_indices(select, size, lora_rank, make_generator(seed, name))
    failure = errors = ""
    device_type = device_type or core.device.type
    if device_type == "cuda" and len(core) > CUSOLVER_ROWS:
        _warn_of_lapack(f"fails above {CUSOLVER_ROWS:,} rows")
    for decompose in choose_decompositions(device_type, len(core)):
        try:
            subspace = _form_subspace(basis, core, indices, decompose(core), seed, name)
            checks = Checks(*subspace.checks.tolist())
            if all(check <= 1 for check in checks):  # false where one is nan
                return subspace
            failure, errors = "inexact", f"; errors divided by their tolerances: {checks}"
        except (LinAlgError, torch.linalg.LinAlgError) as error:
            failure, errors = str(error).strip().partition("\n")[0][:150], ""
        if device_type == "cuda" and decompose is decompose_dense:  # cuSOLVER's
            _warn_of_lapack(f"failed ({failure})")
    raise AstraError(f"{name}: its eigenproblem could not be solved: {failure}{errors}")


def _warn_of_lapack(reason: str) -> None:
    """Warn that LAPACK takes the place of cuSOLVER, to the caller of solve_eigenproblem."""
    warnings.warn(
        f"eigenvectors: cuSOLVER {reason}; taking LAPACK on the CPU, which is slower",
        FallbackWarning,
        stacklevel=3,
    )


def _form_subspace(
    basis: Basis | None,
    core: Tensor,
    indices: Tensor,
    eigenpairs: Eigenpairs,
    seed: int,
    name: str,
) -> Subspace:
    """Return the eigenpairs of `C = Q core Q^T` numbered `indices`, from those of `core`.

    C has d_out - k more eigenvalues than `core`: zeros, which come first, for the complement of Q's
    columns. So C's eigenvector number i is Q times `core`'s eigenvector number i - (d_out - k).
    """
    core_values, compute_vectors = eigenpairs
    num_outside = 0 if basis is None else basis.codimension
    size = num_outside + len(core)
    # Eigenvalues that should be zero are rounding noise of either sign.
    trace = core_values.clamp(min=0).sum()
    zero_bound = min(1.0, 10 / len(indices)) * size * EPS * trace
    num_zeros = int((core_values <= zero_bound).sum())
    core_values[:num_zeros] = 0

    # outside: in the complement of Q's columns; inside: in their span
    outside = indices[indices < num_outside]
    inside = indices[indices >= num_outside]
    columns = []
    if len(outside):
        columns.append(_draw_vectors_outside(basis, len(outside), seed, name))
    if len(inside):
        vectors = _pick_vectors(
            compute_vectors, inside - num_outside, num_zeros, len(core), seed, name
        )
        columns.append(vectors if basis is None else basis.multiply(vectors))
    vectors = torch.cat(columns, 1)
    vectors = vectors * choose_signs(vectors)

    spectrum = torch.cat([core_values.new_zeros(num_outside), core_values])
    values = spectrum[indices.to(core.device)]
    checks = _measure_errors(vectors, values, basis, core, trace)
    return Subspace(vectors, values, spectrum, checks)


def _pick_vectors(
    compute_vectors: Callable[[int, int], Tensor],
    indices: Tensor,
    num_zeros: int,
    size: int,
    seed: int,
    name: str,
) -> Tensor:
    """Return the eigenvectors numbered `indices` of a (size, size) matrix, as columns.

    The matrix's first `num_zeros` eigenvalues are zero. Their eigenvectors are not the
    eigensolver's: directions drawn from (seed, module name) are projected onto the null space.
    """
    num_null = int((indices < num_zeros).sum())
    positive = indices[num_null:]
    # A projection onto the null space needs a basis of it or of its complement: take the smaller.
    few_zeros = num_zeros <= size - num_zeros
    ranges = []
    if num_null:
        ranges.append((0, num_zeros) if few_zeros else (num_zeros, size))
    if len(positive):
        ranges.append((int(positive[0]), int(positive[-1]) + 1))
    # One call for all: vectors of close eigenvalues from separate calls need not be orthogonal.
    start = min(first for first, _ in ranges)
    end = max(last for _, last in ranges)
    computed = compute_vectors(start, end)

    def project(directions: Tensor) -> Tensor:
        if few_zeros:
            null = computed[:, :num_zeros]
            return null @ (null.T @ directions)
        return directions - computed @ (computed.T @ directions)

    columns = []
    if num_null:
        generator = make_generator(seed, f"{name} within")
        directions = draw_directions(size, num_null, generator).to(computed.device)
        columns.append(_orthonormalise_within(project, directions))
    if len(positive):
        columns.append(computed[:, (positive - start).to(computed.device)])
    return torch.cat(columns, 1)


def _draw_vectors_outside(basis: Basis, count: int, seed: int, name: str) -> Tensor:
    """Return `count` orthonormal vectors v orthogonal to Q's columns, (d_out, count).

    `C v = Q core Q^T v = 0` for each, whatever the calibration tokens were.
    """
    generator = make_generator(seed, f"{name} outside")
    directions = draw_directions(len(basis.reflectors), count, generator).to(basis.tau.device)
    return basis.span_in_complement(directions)


def _orthonormalise_within(project: Callable[[Tensor], Tensor], directions: Tensor) -> Tensor:
    """Return orthonormal columns that span the projection of `directions` onto a space.

    For given `directions` they depend on the space alone, not on the basis of it that `project`
    uses, and change smoothly with the space.
    """
    # The second pass removes the rounding errors of the first; two are enough (Parlett, The
    # Symmetric Eigenvalue Problem, section 6.9).
    for _ in range(2):
        directions = torch.linalg.qr(project(directions)).Q
    return directions


def _measure_errors(
    vectors: Tensor, values: Tensor, basis: Basis | None, core: Tensor, trace: Tensor
) -> Tensor:
    """Return the fields of Checks as a (3,) tensor."""
    size, lora_rank = vectors.shape
    inner = vectors.T @ vectors - torch.eye(lora_rank, dtype=torch.float64, device=vectors.device)
    image = _apply_moment(basis, core, vectors)
    residual = (image - vectors * values).norm(dim=0).max()
    energy = ((vectors * image).sum() - values.sum()).abs()
    # LAPACK's errors are a modest multiple of d eps, which 100 covers. 1 % and 10 d eps tr(C) are
    # how far above the least possible the energy of the smallest eigenvectors may be.
    rounding = size * EPS * trace
    # If C is zero, so are the errors of the residual and the energy, and 0 / TINY = 0 passes.
    return torch.stack(
        [
            inner.abs().max() / (100 * size * EPS),
            residual / (100 * rounding + TINY),
            energy / (0.01 * values.sum() + 10 * rounding + TINY),
        ]
    )


def _apply_moment(basis: Basis | None, core: Tensor, vectors: Tensor) -> Tensor:
    """Return `C V = Q core Q^T V`: (d_out, r)."""
    if basis is None:
        return core @ vectors
    return basis.multiply(core @ basis.multiply_transposed(vectors))
