"""astra.svd: a GPU's solvers give LAPACK's triplets, or their check refuses them.

Simulated: the device type "cuda" is forced, so that the solvers of GPUs run on CPU tensors. There
gesvd does not exist, which stands for its failure. A few seconds.
"""

import warnings

import pytest
import torch
from torch import Tensor

from astra import svd
from astra.errors import FallbackWarning
from astra.inits import init_corda, init_milora, init_pissa
from astra.svd import Triplets, compute_svd, decompose_gram

EPS = torch.finfo(torch.float64).eps


def make_matrix(rows: int, columns: int, values: Tensor | None = None) -> Tensor:
    """Return a random matrix, with given singular values or those of Gaussian entries."""
    generator = torch.Generator().manual_seed(rows + columns)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if values is None:
        return matrix
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ torch.diag(values.double()) @ vh


def assert_exact(found: Triplets, matrix: Tensor) -> None:
    """Check orthonormality, and the residuals on both sides, to fp64's rounding."""
    u, values, v = found
    identity = torch.eye(len(values), dtype=torch.float64)
    largest = torch.linalg.matrix_norm(matrix, 2)
    tolerance = 100 * max(matrix.shape) * EPS
    for basis in (u, v):
        assert (basis.T @ basis - identity).abs().max() <= tolerance
    assert (matrix @ v - u * values).norm(dim=0).max() <= tolerance * largest
    assert (matrix.T @ u - v * values).norm(dim=0).max() <= tolerance * largest


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("shape", [(300, 300), (420, 260), (260, 420)])
def test_a_gram_matrix_gives_lapacks_triplets(shape: tuple[int, int], smallest: bool) -> None:
    matrix = make_matrix(*shape)
    count = 24
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compute_svd(matrix, count, smallest, "cuda")
    assert_exact(found, matrix)
    wanted = compute_svd(matrix, count, smallest, "cpu")
    assert_exact(wanted, matrix)
    # Singular values are exact to a rounding of the largest, vectors to that over their gap.
    torch.testing.assert_close(found.values, wanted.values, rtol=0, atol=1e-12 * max(shape))
    assert torch.linalg.svdvals(found.u.T @ wanted.u).min() > 1 - 1e-12
    # The signs are canonical on both.
    torch.testing.assert_close(found.u, wanted.u, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.v, wanted.v, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "tail",
    [
        torch.logspace(-3, -9, 40),  # below sqrt(eps) of the largest
        torch.full((40,), 1e-8),
        torch.zeros(40),
        torch.cat([torch.full((20,), 1e-7), torch.zeros(20)]),
    ],
    ids=["falling", "equal", "zero", "half zero"],
)
def test_a_tail_that_squares_lose_is_left_to_lapack(tail: Tensor) -> None:
    matrix = make_matrix(300, 300, torch.cat([torch.linspace(1, 0.1, 260), tail]))
    with pytest.raises(torch.linalg.LinAlgError, match="below what a Gram matrix resolves"):
        decompose_gram(matrix, 32, True)
    with pytest.warns(FallbackWarning) as said:
        found = compute_svd(matrix, 32, True, "cuda")
    assert [str(warning.message).partition(" (")[0] for warning in said] == [
        "singular vectors: the Gram matrix failed",
        "singular vectors: cuSOLVER's gesvd failed",
    ]
    assert_exact(found, matrix)
    assert torch.equal(found.u, compute_svd(matrix, 32, True, "cpu").u)
    # The same matrix's largest triplets need no other solver.
    assert_exact(compute_svd(matrix, 32, False, "cuda"), matrix)


def test_inexact_vectors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, eigh = make_matrix(300, 300), torch.linalg.eigh

    def spoil(gram: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(gram)
        vectors[:, -5] = torch.nn.functional.normalize(vectors[:, -5] + 1e-7 * vectors[:, 3], dim=0)
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", spoil)
    with pytest.raises(torch.linalg.LinAlgError, match="not exact enough"):
        decompose_gram(matrix, 24, False)
    with pytest.warns(FallbackWarning):
        assert_exact(compute_svd(matrix, 24, False, "cuda"), matrix)


@pytest.mark.parametrize("error", [RuntimeError("cusolver error: 7"), torch.OutOfMemoryError("no")])
def test_a_failure_of_cusolver_is_left_to_the_next(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Tensor) -> None:
        raise error

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    matrix = make_matrix(300, 300)
    with pytest.warns(FallbackWarning) as said:
        found = compute_svd(matrix, 24, False, "cuda")
    assert str(said[0].message).startswith(f"singular vectors: the Gram matrix failed ({error})")
    assert_exact(found, matrix)


def test_small_matrices_and_cpus_are_solved_as_ever() -> None:
    assert svd.choose_svds("cpu", 5000) == [svd.decompose_whole]
    assert svd.choose_svds("cuda", 64) == [svd.decompose_whole, svd.decompose_on_cpu]


def test_initial_factors_are_those_of_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = make_matrix(320, 280), make_matrix(280, 280)
    moment = moment @ moment.T

    def make_factors() -> list[Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            pairs = [
                init_pissa(weight, 16, 2.0),
                init_milora(weight, 16, 2.0),
                init_corda(weight, moment, 16, 2.0, "ipm"),
                init_corda(weight, moment, 16, 2.0, "kpm"),
            ]
        return [b0 @ a0 for a0, b0 in pairs]

    wanted, choose = make_factors(), svd.choose_svds
    monkeypatch.setattr(svd, "choose_svds", lambda _, size: choose("cuda", size))
    for found, on_cpu in zip(make_factors(), wanted, strict=True):
        torch.testing.assert_close(found, on_cpu, rtol=0, atol=1e-7 * on_cpu.abs().max())
