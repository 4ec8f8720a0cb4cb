"""Initial factors are what the papers' formulas say, and what PEFT makes of the same weights and statistics."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from astra import inits
from astra.eigen import Subspace, solve
from astra.factor import output_moment
from astra.moments import Moment


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def subspace_of(weight: Tensor, tokens: int, rank: int, select: str) -> Subspace:
    moment = Moment.zeros(weight.shape[1], torch.device("cpu"))
    moment.add(random(tokens, weight.shape[1], seed=1))
    return solve(*output_moment("input", moment, weight, None), rank, select, 0, "m")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_astra_is_v_and_its_projection_of_the_weight_in_fp64(dtype: torch.dtype) -> None:
    weight = random(10, 14).to(dtype)
    subspace = subspace_of(weight, 40, 4, "largest")
    a0, b0 = inits.astra(weight, subspace)
    assert (a0.dtype, b0.dtype) == (torch.float64, torch.float64)
    assert torch.equal(b0, subspace.vectors)
    # Two fp64 products of 10 terms.
    torch.testing.assert_close(a0, subspace.vectors.T @ weight.double(), rtol=0, atol=1e-13)
    assert a0.abs().min() > 0


# 20 outputs of 6 inputs: eigenvalues 0 to 13 are zero. Middle 10 are indices 5 to 14, of which one is not.
@pytest.mark.parametrize(("select", "rank", "zero"), [("smallest", 16, 14), ("middle", 10, 9), ("largest", 8, 2)])
def test_rows_of_a0_are_exactly_zero_where_eigenvalues_are_and_nowhere_else(select: str, rank: int, zero: int) -> None:
    weight = random(20, 6)
    subspace = subspace_of(weight, 50, rank, select)
    a0, b0 = inits.astra(weight, subspace)
    wanted = [True] * zero + [False] * (rank - zero)
    assert (subspace.values == 0).tolist() == wanted
    assert (a0 == 0).all(1).tolist() == wanted
    assert torch.equal(b0, subspace.vectors)
    assert b0.any(0).all()


def test_all_eigenvectors_together_give_the_whole_weight_back() -> None:
    weight = random(12, 5)
    a0, b0 = inits.astra(weight, subspace_of(weight, 30, 12, "smallest"))
    torch.testing.assert_close(b0 @ a0, weight, rtol=0, atol=1e-12)


def test_plain_lora_is_kaiming_uniform_like_pefts() -> None:
    weight = torch.zeros(8, 400)
    a0, b0 = inits.lora(weight, 50, 7, "m")
    assert (a0.shape, b0.shape, a0.dtype, b0.dtype) == ((50, 400), (8, 50), torch.float64, torch.float64)
    bound = 400**-0.5
    assert a0.abs().max() <= bound
    # 20,000 uniform draws: the mean's standard error is bound / 245, the variance's relative one 0.6 %.
    assert a0.mean().abs() < 5 * bound / 245
    assert a0.var().item() == pytest.approx(bound**2 / 3, rel=0.03)
    assert not b0.any()


def test_plain_lora_does_not_look_at_the_weights_values() -> None:
    a, b = (inits.lora(weight, 3, 1, "m")[0] for weight in (torch.zeros(6, 9), random(6, 9)))
    assert torch.equal(a, b)


RANK, ALPHA = 4, 6
SCALING = ALPHA / RANK
SHAPES = [(12, 20), (20, 12), (16, 16)]


class Net(nn.Module):
    """One linear layer, d_in -> d_out."""

    def __init__(self, d_out: int, d_in: int) -> None:
        super().__init__()
        self.layer = nn.Linear(d_in, d_out, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(random(d_out, d_in, seed=4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def peft_factors(net: nn.Module, init: str | bool, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """(A0, B0, W_res) as PEFT makes them, in fp32."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"], init_lora_weights=init, **options)
    layer = get_peft_model(net, config).base_model.model.layer
    return tuple(p.detach() for p in (layer.lora_A.default.weight, layer.lora_B.default.weight, layer.weight))


def assert_same_up_to_sign(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], tolerance: float) -> None:
    """Row i of A0 and column i of B0 may change sign together; B0 = 0 leaves A0's rows to do so."""
    (a, b), (a_theirs, b_theirs) = ours, (factor.double() for factor in theirs)
    signs = (a * a_theirs).sum(1).sign()
    torch.testing.assert_close(a * signs[:, None], a_theirs, rtol=0, atol=tolerance)
    torch.testing.assert_close(b * signs, b_theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("init", "ours"),
    [("pissa", lambda weight: inits.pissa(weight, RANK, SCALING)), ("olora", lambda weight: inits.olora(weight, RANK))],
    ids=["pissa", "olora"],
)
def test_factors_of_the_weight_are_pefts(init: str, ours: Callable, shape: tuple[int, int]) -> None:
    net = Net(*shape)
    weight = net.layer.weight.detach().clone()
    a0, b0 = ours(weight)
    a_peft, b_peft, residual = peft_factors(net, init)
    assert_same_up_to_sign((a0, b0), (a_peft, b_peft), 1e-5)  # PEFT works in fp32
    torch.testing.assert_close(weight - SCALING * (b0 @ a0).float(), residual, rtol=0, atol=1e-5)


sizes = st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(1, 8), st.integers(0, 99), st.floats(0.25, 4))


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_pissa_and_milora_share_out_the_weight_between_them(drawn: tuple) -> None:
    d_out, d_in, rank, seed, scaling = drawn
    smaller = min(d_out, d_in)
    rank = min(rank, smaller - 1)
    weight = random(d_out, d_in, seed=seed)
    values = torch.linalg.svdvals(weight)
    top, rest = inits.pissa(weight, rank, scaling), inits.milora(weight, smaller - rank, scaling)
    torch.testing.assert_close(scaling * (top[1] @ top[0] + rest[1] @ rest[0]), weight, rtol=0, atol=1e-12)
    least_a, least_b = inits.milora(weight, rank, scaling)
    # Of all parts of rank r the largest and the smallest: their norms are the singular values that they take.
    torch.testing.assert_close(scaling * (top[1] @ top[0]).norm(), values[:rank].norm(), rtol=1e-12, atol=0)
    torch.testing.assert_close(scaling * (least_b @ least_a).norm(), values[-rank:].norm(), rtol=1e-9, atol=1e-13)
    for a0, b0 in (top, rest, (least_a, least_b)):  # shared out evenly
        torch.testing.assert_close(a0.norm(dim=1), b0.norm(dim=0), rtol=1e-9, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(sizes)
def test_a_smaller_rank_takes_the_first_rows_and_columns(drawn: tuple) -> None:
    d_out, d_in, rank, seed, scaling = drawn
    most = min(d_out, d_in)
    weight, moment = random(d_out, d_in, seed=seed), random(30, d_in, seed=seed + 1)
    moment = moment.T @ moment
    makers = [
        lambda r: inits.pissa(weight, r, scaling),
        lambda r: inits.milora(weight, r, scaling),
        lambda r: inits.olora(weight, r),
        lambda r: inits.corda(weight, moment, r, scaling, "ipm"),
        lambda r: inits.corda(weight, moment, r, scaling, "kpm"),
        lambda r: inits.eva(moment, d_out, r, 0, "m"),
    ]
    for make in makers:
        (a, b), (a_all, b_all) = make(min(rank, most)), make(most)
        torch.testing.assert_close(a, a_all[: len(a)], rtol=0, atol=1e-9)
        torch.testing.assert_close(b, b_all[:, : len(a)], rtol=0, atol=1e-9)
