"""astra.eigen: the subspace is the one that eigen_select names, whatever the spectrum.

Matrices of known spectra, singular and ill-conditioned ones among them, on the CPU. A few seconds.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from astra import eigen
from astra.eigen import (
    EPS,
    Subspace,
    choose_signs,
    make_generator,
    select_indices,
    solve_eigenproblem,
)
from astra.errors import AstraError, FallbackWarning
from astra.output_moment import find_basis

SELECTS = ("smallest", "largest", "middle", "random")


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    ).Q
    second = q @ torch.diag(values.double()) @ q.T
    return (second + second.T) / 2


def energy(subspace: Subspace, second: Tensor) -> float:
    return (subspace.vectors.T @ second @ subspace.vectors).trace().item()


def check_contract(subspace: Subspace, second: Tensor, rank: int, select: str) -> None:
    size = len(second)
    spectrum = torch.linalg.eigvalsh(second).clamp(min=0)
    slack = 10 * size * EPS * second.trace().item()
    inner = subspace.vectors.T @ subspace.vectors
    torch.testing.assert_close(
        inner, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12 * size
    )
    assert (subspace.values.diff() >= 0).all()
    if select == "smallest":
        assert energy(subspace, second) <= 1.01 * spectrum[:rank].sum() + slack
    if select == "largest":
        assert energy(subspace, second) >= 0.99 * spectrum[-rank:].sum() - slack


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 24).flatmap(
        lambda size: st.tuples(st.just(size), st.integers(1, size), st.integers(0, size))
    ),
    st.sampled_from(SELECTS),
    st.integers(0, 9),
    st.floats(-9, 9),
)
def test_contract_for_any_size_rank_nullity_and_scale(
    sizes: tuple[int, int, int], select: str, seed: int, scale: float
) -> None:
    size, rank, nullity = sizes
    values = torch.logspace(0, -6, size, dtype=torch.float64) * 10**scale
    values[:nullity] = 0
    if nullity == size:
        values[0] = 10**scale
    second = with_spectrum(values, seed)
    check_contract(
        solve_eigenproblem(None, second, rank, select, seed, "layer"), second, rank, select
    )


def test_ill_conditioned_tail_is_exact() -> None:
    """From 1e7 down to 1e-4: fp32 returns a tail with many times the least energy."""
    second = with_spectrum(torch.logspace(7, -4, 128, dtype=torch.float64))
    subspace = solve_eigenproblem(None, second, 8, "smallest", 0, "layer")
    assert energy(subspace, second) <= 1.01 * torch.linalg.eigvalsh(second)[:8].sum().item()
    fp32 = torch.linalg.eigh(second.float()).eigenvectors[:, :8].double()
    assert (fp32.T @ second @ fp32).trace() > 2 * energy(subspace, second)


def test_zero_eigenvalues_are_exactly_zero_and_null_vectors_come_first() -> None:
    second = with_spectrum(torch.tensor([0.0, 0, 0, 2, 3, 5, 7, 9]))
    subspace = solve_eigenproblem(None, second, 5, "smallest", 0, "layer")
    assert subspace.values[:3].tolist() == [0, 0, 0]
    torch.testing.assert_close(subspace.values[3:], torch.tensor([2.0, 3], dtype=torch.float64))
    assert (second @ subspace.vectors[:, :3]).abs().max() < 1e-14


def test_the_null_space_of_a_tall_weight_is_exact_and_independent_of_the_data() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    basis = find_basis(weight, None)
    r = basis.reflectors[:6].triu()
    first, second = (
        r @ with_spectrum(torch.logspace(0, -e, 6, dtype=torch.float64), e) @ r.T for e in (1, 5)
    )
    a = solve_eigenproblem(basis, first, 8, "smallest", 3, "layer")
    b = solve_eigenproblem(basis, second, 8, "smallest", 3, "layer")
    assert (a.values == 0).all()
    assert (a.vectors.T @ weight).abs().max() < 1e-13
    torch.testing.assert_close(a.vectors, b.vectors, rtol=0, atol=1e-12)


def test_a_tiny_change_of_the_moment_moves_a_degenerate_tail_by_as_little() -> None:
    """The choice in a null space follows the null space, not the eigensolver's rounding noise."""
    values = torch.cat([torch.zeros(12), torch.linspace(1, 2, 8)])
    second = with_spectrum(values)
    noise = torch.randn(20, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = second @ (noise + noise.T) @ second * 1e-12
    a, b = (
        solve_eigenproblem(None, moment, 5, "smallest", 0, "layer")
        for moment in (second, second + noise)
    )
    torch.testing.assert_close(a.vectors, b.vectors, rtol=0, atol=1e-9)


@given(
    st.integers(1, 50).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size))),
    st.integers(0, 5),
)
def test_indices_are_those_of_the_definition(sizes: tuple[int, int], seed: int) -> None:
    size, rank = sizes
    pick = {s: select_indices(s, size, rank, make_generator(seed, "m")).tolist() for s in SELECTS}
    assert pick["smallest"] == list(range(rank))
    assert pick["largest"] == list(range(size - rank, size))
    assert pick["middle"] == list(range((size - rank) // 2, (size - rank) // 2 + rank))
    assert pick["random"] == sorted(set(pick["random"]))
    assert len(pick["random"]) == rank


def test_random_depends_on_seed_and_name_alone() -> None:
    def draw(seed: int, name: str) -> list[int]:
        return select_indices("random", 1000, 20, make_generator(seed, name)).tolist()

    assert draw(1, "a") == draw(1, "a")
    assert draw(1, "a") != draw(2, "a")
    assert draw(1, "a") != draw(1, "b")


def test_signs_are_canonical() -> None:
    vectors = torch.tensor([[0.6, -0.8], [-0.8, 0.6]])
    assert choose_signs(vectors).tolist() == [-1, -1]
    assert choose_signs(-vectors).tolist() == [1, 1]


def test_what_cannot_be_solved_is_named() -> None:
    second = torch.eye(4, dtype=torch.float64)
    with pytest.raises(AstraError, match="5 is above the 4 outputs of layer") as error:
        solve_eigenproblem(None, second, 5, "smallest", 0, "layer")
    assert error.value.subject == "rank"
    with pytest.raises(AstraError, match="layer: its calibration moment is not finite"):
        solve_eigenproblem(None, second * torch.nan, 2, "smallest", 0, "layer")
    with pytest.raises(AstraError, match="'tail' is none of smallest, largest") as error:
        solve_eigenproblem(None, second, 2, "tail", 0, "layer")
    assert error.value.subject == "eigen_select"


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize(
    "spectrum", [(7, -4), (0, -2), (4, 4)], ids=["1e7 to 1e-4", "mild", "all alike"]
)
def test_the_vectors_are_the_eigenvectors_at_the_named_indices(
    select: str, spectrum: tuple[int, int]
) -> None:
    values = torch.logspace(spectrum[1], spectrum[0], 40, dtype=torch.float64)
    second = with_spectrum(values, 8)
    subspace = solve_eigenproblem(None, second, 7, select, 5, "layer")
    indices = select_indices(select, 40, 7, make_generator(5, "layer"))
    slack = (
        40 * EPS * second.trace().item()
    )  # what rounding the matrix itself moves its eigenvalues by
    torch.testing.assert_close(subspace.values, values[indices], rtol=0, atol=slack)
    residual = second @ subspace.vectors - subspace.vectors * subspace.values
    assert residual.abs().max() <= slack


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("rank", [5, 18])
def test_a_tall_weights_small_problem_gives_what_the_whole_matrix_gives(
    select: str, rank: int
) -> None:
    """20 outputs of 6 inputs: the null space has dimension 14, and some choices reach beyond it."""
    weight = torch.randn(20, 6, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    basis = find_basis(weight, None)
    r = basis.reflectors[:6].triu()
    moment = with_spectrum(torch.logspace(0, -3, 6, dtype=torch.float64), 13)
    second = weight @ moment @ weight.T
    by_basis = solve_eigenproblem(basis, r @ moment @ r.T, rank, select, 2, "layer")
    whole = solve_eigenproblem(None, second, rank, select, 2, "layer")
    torch.testing.assert_close(
        by_basis.values, whole.values, rtol=1e-9, atol=0
    )  # zeros are zeros in both
    assert (by_basis.values == 0).any() or (select == "largest" and rank == 5)
    positive = by_basis.values > 0
    # Distinct eigenvalues with gaps above 1e-3 of the trace or so: their vectors agree to rounding
    # over the gap.
    torch.testing.assert_close(
        by_basis.vectors[:, positive], whole.vectors[:, positive], rtol=0, atol=1e-8
    )
    for found in (by_basis, whole):
        torch.testing.assert_close(
            found.vectors.T @ found.vectors, torch.eye(rank, dtype=torch.float64)
        )
        assert (
            second @ found.vectors - found.vectors * found.values
        ).abs().max() < 1e-12 * second.trace()


def test_which_random_eigenvectors_depends_on_seed_and_name_and_not_on_the_moment() -> None:
    ones = torch.arange(1, 31, dtype=torch.float64)

    def drawn(power: int, seed: int, name: str) -> list[int]:
        values = solve_eigenproblem(
            None, with_spectrum(ones**power, power), 6, "random", seed, name
        ).values
        return values.pow(1 / power).round().long().tolist()

    assert drawn(1, 0, "a") == drawn(2, 0, "a")
    assert drawn(1, 0, "a") != drawn(1, 1, "a")
    assert drawn(1, 0, "a") != drawn(1, 0, "b")


def test_solving_twice_gives_the_same_bits() -> None:
    second = with_spectrum(torch.cat([torch.zeros(9), torch.linspace(1, 2, 8)]))
    for select in SELECTS:
        a, b = (solve_eigenproblem(None, second.clone(), 6, select, 1, "layer") for _ in range(2))
        assert torch.equal(a.vectors, b.vectors)
        assert torch.equal(a.values, b.values)


@pytest.mark.parametrize("size", [6, 70])  # below and above eigen.DENSE_BELOW
def test_a_module_whose_outputs_are_all_zero_has_a_tail_of_zero_energy(size: int) -> None:
    second = torch.zeros(size, size, dtype=torch.float64)
    subspace = solve_eigenproblem(None, second, 3, "smallest", 0, "layer")
    assert not subspace.values.any()
    torch.testing.assert_close(
        subspace.vectors.T @ subspace.vectors, torch.eye(3, dtype=torch.float64)
    )


def test_zeros_and_the_smallest_beside_them_come_orthogonal_from_lapack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eigenvalues fall to the rounding of the trace, where one call for all vectors is needed.

    Separate calls of stemr gave vectors 1e-6 from orthogonal, so the dense solver had to step in.
    """

    def never(_: torch.Tensor) -> None:
        pytest.fail("the dense solver was needed")

    monkeypatch.setattr(eigen, "decompose_dense", never)
    generator = torch.Generator().manual_seed(0)
    size = 300
    weight = torch.randn(size, size, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -7, size, dtype=torch.float64)
    inputs = torch.randn(4 * size, size, generator=generator, dtype=torch.float64) * scales
    outputs = inputs @ weight.T
    found = solve_eigenproblem(None, outputs.T @ outputs / len(outputs), 64, "smallest", 0, "m")
    assert 0 < (found.values == 0).sum() < 64
    assert found.checks[0] < 0.01  # orthonormality


@pytest.mark.parametrize("size", [20, 90])  # below and above eigen.DENSE_BELOW
@pytest.mark.parametrize(
    "error",
    [
        torch.linalg.LinAlgError("did not converge"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_INVALID_VALUE\nmore"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
    ids=["converge", "status", "memory"],
)
def test_what_cusolver_cannot_solve_lapack_does(
    size: int, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: torch.linalg.eigh of a CPU tensor stands for cuSOLVER's, and fails once."""
    core, eigh, calls = with_spectrum(torch.logspace(-6, 0, size)), torch.linalg.eigh, []

    def fail_once(matrix: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(matrix))
        if len(calls) == 1:
            raise error
        return eigh(matrix)

    wanted = solve_eigenproblem(None, core, 5, "smallest", 0, "m")
    monkeypatch.setattr(torch.linalg, "eigh", fail_once)
    with pytest.warns(FallbackWarning, match=r"cuSOLVER failed \(.*\); taking LAPACK") as said:
        found = solve_eigenproblem(None, core, 5, "smallest", 0, "m", "cuda")
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    assert torch.equal(found.vectors, wanted.vectors)


def test_above_cusolvers_limit_lapack_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: a limit of 80 rows, and torch.linalg.eigh stands for cuSOLVER's."""
    core = with_spectrum(torch.logspace(-6, 0, 90))
    wanted = solve_eigenproblem(None, core, 5, "smallest", 0, "m")
    monkeypatch.setattr(eigen, "CUSOLVER_ROWS", 80)
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: pytest.fail("cuSOLVER was tried"))
    with pytest.warns(FallbackWarning, match="cuSOLVER fails above 80 rows; taking LAPACK") as said:
        found = solve_eigenproblem(None, core, 5, "smallest", 0, "m", "cuda")
    assert len(said) == 1
    assert torch.equal(found.vectors, wanted.vectors)


def test_a_gpus_solver_gives_the_vectors_of_lapacks() -> None:
    """Simulated: torch.linalg.eigh of a CPU tensor stands for cuSOLVER's."""
    core = with_spectrum(torch.logspace(-6, 0, 90))
    for select in SELECTS:
        on_cpu, on_gpu = (
            solve_eigenproblem(None, core, 5, select, 0, "m", kind) for kind in ("cpu", "cuda")
        )
        torch.testing.assert_close(on_gpu.values, on_cpu.values, rtol=1e-8, atol=1e-15)
        torch.testing.assert_close(on_gpu.vectors, on_cpu.vectors, rtol=0, atol=1e-6)


def test_what_no_solver_can_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("cusolver error: 7")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    monkeypatch.setattr(eigen, "decompose_tridiagonal", eigen.decompose_dense)
    core = with_spectrum(torch.linspace(1, 2, 80))
    with (
        pytest.warns(FallbackWarning),
        pytest.raises(AstraError, match="m: its eigenproblem could not be solved: cusolver error"),
    ):
        solve_eigenproblem(None, core, 5, "smallest", 0, "m", "cuda")


def test_a_failure_is_named_without_the_errors_of_an_earlier_solver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    def decompose_inexactly(matrix: Tensor) -> eigen.Eigenpairs:
        values, vectors = torch.linalg.eigh(matrix)
        return values, lambda start, end: 2 * vectors[:, start:end]

    core = with_spectrum(torch.linspace(1, 2, 80))
    monkeypatch.setattr(eigen, "decompose_tridiagonal", decompose_inexactly)
    monkeypatch.setattr(eigen, "decompose_dense", fail)
    with pytest.raises(AstraError, match=r"could not be solved: did not converge$"):
        solve_eigenproblem(None, core, 5, "smallest", 0, "m")
    monkeypatch.setattr(eigen, "decompose_dense", decompose_inexactly)
    with pytest.raises(AstraError, match=r"solved: inexact; errors divided by .*Checks\(ortho"):
        solve_eigenproblem(None, core, 5, "smallest", 0, "m")
