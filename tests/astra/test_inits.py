"""astra.inits: initial factors are those of the papers' formulas, and of PEFT for the same input.

Small random matrices on the CPU; PEFT's own initialisers are the oracle. A few seconds.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_eva_state_dict, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from scipy.stats import beta, kstest
from torch import Tensor, nn

from astra import inits
from astra.eigen import Subspace, solve_eigenproblem
from astra.errors import AstraError
from astra.moments import Moment
from astra.output_moment import form_output_moment


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def subspace_of(weight: Tensor, tokens: int, rank: int, select: str) -> Subspace:
    moment = Moment.zeros(weight.shape[1], torch.device("cpu"))
    moment.add(random(tokens, weight.shape[1], seed=1))
    return solve_eigenproblem(
        *form_output_moment("input", moment, weight, None), rank, select, 0, "m"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_astra_is_v_and_its_projection_of_the_weight_in_fp64(dtype: torch.dtype) -> None:
    weight = random(10, 14).to(dtype)
    subspace = subspace_of(weight, 40, 4, "largest")
    a0, b0 = inits.init_astra(weight, subspace.vectors, subspace.values)
    assert (a0.dtype, b0.dtype) == (torch.float64, torch.float64)
    assert torch.equal(b0, subspace.vectors)
    # Two fp64 products of 10 terms.
    torch.testing.assert_close(a0, subspace.vectors.T @ weight.double(), rtol=0, atol=1e-13)
    assert a0.abs().min() > 0


# 20 outputs of 6 inputs: eigenvalues 0 to 13 are zero. Middle 10 are indices 5 to 14, of which one
# is not.
@pytest.mark.parametrize(
    ("select", "rank", "zero"), [("smallest", 16, 14), ("middle", 10, 9), ("largest", 8, 2)]
)
def test_rows_of_a0_are_exactly_zero_where_eigenvalues_are_and_nowhere_else(
    select: str, rank: int, zero: int
) -> None:
    weight = random(20, 6)
    subspace = subspace_of(weight, 50, rank, select)
    a0, b0 = inits.init_astra(weight, subspace.vectors, subspace.values)
    wanted = [True] * zero + [False] * (rank - zero)
    assert (subspace.values == 0).tolist() == wanted
    assert (a0 == 0).all(1).tolist() == wanted
    assert torch.equal(b0, subspace.vectors)
    assert b0.any(0).all()


def test_all_eigenvectors_together_give_the_whole_weight_back() -> None:
    weight = random(12, 5)
    subspace = subspace_of(weight, 30, 12, "smallest")
    a0, b0 = inits.init_astra(weight, subspace.vectors, subspace.values)
    torch.testing.assert_close(b0 @ a0, weight, rtol=0, atol=1e-12)


def draw_haar(size: int, rank: int, seed: int) -> Tensor:
    return inits.init_haar(torch.zeros(size, 3), rank, seed, "m")[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_haar_is_an_orthonormal_basis_and_the_weights_projection_on_it(dtype: torch.dtype) -> None:
    weight = random(30, 14).to(dtype)
    a0, b0 = inits.init_haar(weight, 5, 7, "m")
    assert (a0.dtype, b0.dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(b0.T @ b0, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(a0, b0.T @ weight.double(), rtol=0, atol=1e-13)
    # What stays of W has no part in the basis.
    residual = weight.double() - b0 @ a0
    torch.testing.assert_close(b0.T @ residual, torch.zeros_like(a0), rtol=0, atol=1e-13)


def test_haar_depends_on_seed_and_name_alone() -> None:
    weight = random(30, 14)
    _, b0 = inits.init_haar(weight, 5, 7, "m")
    assert torch.equal(b0, inits.init_haar(2 * weight, 5, 7, "m")[1])
    for seed, name in ((8, "m"), (7, "n")):
        assert (b0 - inits.init_haar(weight, 5, seed, name)[1]).abs().max() > 0.1


def test_haars_law_is_that_of_a_uniform_subspace_with_a_uniform_basis() -> None:
    """The squared projection of a fixed unit vector is Beta(r / 2, (d - r) / 2) distributed."""
    size, rank, count = 7, 3, 3000
    bases = torch.stack([draw_haar(size, rank, seed) for seed in range(count)])
    for direction in (torch.eye(size)[0].double(), torch.full((size,), size**-0.5).double()):
        projections = (bases.transpose(1, 2) @ direction).square().sum(1)
        assert kstest(projections, beta(rank / 2, (size - rank) / 2).cdf).pvalue > 0.01
    # Each column is a uniform unit vector: its entries have either sign. LAPACK's Q alone would
    # have one sign on its diagonal.
    for entries in bases.diagonal(dim1=1, dim2=2).T:
        assert kstest(entries.square(), beta(0.5, (size - 1) / 2).cdf).pvalue > 0.01
        assert abs(entries.sign().mean()) < 3 / count**0.5


def test_plain_lora_is_kaiming_uniform_like_pefts() -> None:
    weight = torch.zeros(8, 400)
    a0, b0 = inits.init_lora(weight, 50, 7, "m")
    assert (a0.shape, b0.shape, a0.dtype, b0.dtype) == (
        (50, 400),
        (8, 50),
        torch.float64,
        torch.float64,
    )
    bound = 400**-0.5
    assert a0.abs().max() <= bound
    # 20,000 uniform draws: the mean's standard error is bound / 245, the variance's relative one
    # 0.6 %.
    assert a0.mean().abs() < 5 * bound / 245
    assert a0.var().item() == pytest.approx(bound**2 / 3, rel=0.03)
    assert not b0.any()


def test_plain_lora_does_not_look_at_the_weights_values() -> None:
    a, b = (inits.init_lora(weight, 3, 1, "m")[0] for weight in (torch.zeros(6, 9), random(6, 9)))
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


def peft_factors(
    net: nn.Module, init: str | bool, **options: object
) -> tuple[Tensor, Tensor, Tensor]:
    """(A0, B0, W_res) as PEFT makes them, in fp32."""
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["layer"], init_lora_weights=init, **options
    )
    layer = get_peft_model(net, config).base_model.model.layer
    return tuple(
        p.detach() for p in (layer.lora_A.default.weight, layer.lora_B.default.weight, layer.weight)
    )


def assert_same_up_to_sign(
    ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], tolerance: float
) -> None:
    """Row i of A0 and column i of B0 may change sign together; B0 = 0 leaves A0's rows to do so."""
    (a, b), (a_theirs, b_theirs) = ours, (factor.double() for factor in theirs)
    signs = (a * a_theirs).sum(1).sign()
    torch.testing.assert_close(a * signs[:, None], a_theirs, rtol=0, atol=tolerance)
    torch.testing.assert_close(b * signs, b_theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("init", "ours"),
    [
        ("pissa", lambda weight: inits.init_pissa(weight, RANK, SCALING)),
        ("olora", lambda weight: inits.init_olora(weight, RANK)),
    ],
    ids=["pissa", "olora"],
)
def test_factors_of_the_weight_are_pefts(init: str, ours: Callable, shape: tuple[int, int]) -> None:
    net = Net(*shape)
    weight = net.layer.weight.detach().clone()
    a0, b0 = ours(weight)
    a_peft, b_peft, residual = peft_factors(net, init)
    assert_same_up_to_sign((a0, b0), (a_peft, b_peft), 1e-5)  # PEFT works in fp32
    torch.testing.assert_close(weight - SCALING * (b0 @ a0).float(), residual, rtol=0, atol=1e-5)


sizes = st.tuples(
    st.integers(2, 9), st.integers(2, 9), st.integers(1, 8), st.integers(0, 99), st.floats(0.25, 4)
)


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_pissa_and_milora_split_the_weight_between_them(drawn: tuple) -> None:
    d_out, d_in, rank, seed, scaling = drawn
    smaller = min(d_out, d_in)
    rank = min(rank, smaller - 1)
    weight = random(d_out, d_in, seed=seed)
    values = torch.linalg.svdvals(weight)
    top, rest = (
        inits.init_pissa(weight, rank, scaling),
        inits.init_milora(weight, smaller - rank, scaling),
    )
    torch.testing.assert_close(
        scaling * (top[1] @ top[0] + rest[1] @ rest[0]), weight, rtol=0, atol=1e-12
    )
    least_a, least_b = inits.init_milora(weight, rank, scaling)
    # Of all parts of rank r the largest and the smallest: their norms are the singular values that
    # they take.
    torch.testing.assert_close(
        scaling * (top[1] @ top[0]).norm(), values[:rank].norm(), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        scaling * (least_b @ least_a).norm(), values[-rank:].norm(), rtol=1e-9, atol=1e-13
    )
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
        lambda r: inits.init_pissa(weight, r, scaling),
        lambda r: inits.init_milora(weight, r, scaling),
        lambda r: inits.init_olora(weight, r),
        lambda r: inits.init_corda(weight, moment, r, scaling, "ipm"),
        lambda r: inits.init_corda(weight, moment, r, scaling, "kpm"),
        lambda r: inits.init_eva(moment, d_out, r, 0, "m"),
    ]
    for make in makers:
        (a, b), (a_all, b_all) = make(min(rank, most)), make(most)
        torch.testing.assert_close(a, a_all[: len(a)], rtol=0, atol=1e-9)
        torch.testing.assert_close(b, b_all[:, : len(a)], rtol=0, atol=1e-9)


def tokens_for(d_in: int) -> Tensor:
    """Return 40 inputs, (40, d_in). Their largest entry is 1, so that PEFT's CorDA leaves them."""
    x = random(40, d_in, seed=5) * torch.linspace(0.3, 2, d_in) + 0.5
    return (x / x.max()).float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_cordas_factors_are_pefts_on_the_same_inputs(
    mode: inits.CordaMode, shape: tuple[int, int]
) -> None:
    net, x = Net(*shape), tokens_for(shape[1])
    weight = net.layer.weight.detach().clone()
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["layer"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )
    preprocess_corda(net, config, run_model=lambda: net(x))
    layer = get_peft_model(net, config).base_model.model.layer
    second = x.double().T @ x.double()  # PEFT's sum over one sample
    a0, b0 = inits.init_corda(weight, second, RANK, SCALING, mode)
    # Only the share of either differs: ours does not depend on the moment's scale, so that C's
    # trace is d_in.
    share = second.diagonal().mean().sqrt()
    if mode == "kpm":  # PEFT has the smallest last
        a0, b0 = a0.flip(0), b0.flip(1)
    theirs = (
        layer.lora_A.default.weight.detach() * share,
        layer.lora_B.default.weight.detach() / share,
    )
    assert_same_up_to_sign((a0, b0), theirs, 2e-4)  # PEFT inverts in fp32
    residual = weight - SCALING * (b0 @ a0).float()
    torch.testing.assert_close(residual, layer.weight.detach(), rtol=0, atol=2e-4)


@settings(max_examples=40, deadline=None)
@given(sizes, st.floats(1e-6, 1e6))
def test_cordas_ends_are_those_of_the_outputs_they_leave(drawn: tuple, scale: float) -> None:
    d_out, d_in, rank, seed, scaling = drawn
    rank = min(rank, d_out, d_in)
    weight, x = random(d_out, d_in, seed=seed), random(30, d_in, seed=seed + 1)
    second = x.T @ x
    damped = second / second.diagonal().mean() + inits.CORDA_DAMPING * torch.eye(d_in)
    values = torch.linalg.svdvals(weight @ damped)
    for mode, wanted in (("ipm", values[:rank]), ("kpm", values[-rank:].flip(0))):
        a0, b0 = inits.init_corda(weight, second, rank, scaling, mode)
        seen = torch.linalg.svdvals(scaling * b0 @ a0 @ damped)[:rank]
        torch.testing.assert_close(seen, wanted.sort(descending=True).values, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(b0.norm(dim=0), (wanted / scaling).sqrt(), rtol=1e-7, atol=1e-9)
        a_other, b_other = inits.init_corda(weight, scale * second, rank, scaling, mode)
        torch.testing.assert_close(a_other, a0, rtol=0, atol=1e-6)
        torch.testing.assert_close(b_other, b0, rtol=0, atol=1e-6)
    whole = inits.init_corda(weight, second, min(d_out, d_in), scaling, "ipm")
    torch.testing.assert_close(scaling * whole[1] @ whole[0], weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_evas_factors_are_pefts_on_the_same_inputs(shape: tuple[int, int]) -> None:
    d_out, d_in = shape
    rank = d_in // 2  # then PEFT's randomised decomposition is a whole one
    net, x = Net(d_out, d_in), tokens_for(d_in)
    config = LoraConfig(
        r=rank,
        target_modules=["layer"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0, tau=0.999),
    )
    found = get_eva_state_dict(
        net,
        [{"x": x}],
        config,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda layer_input, *_: layer_input[0],
        show_progress_bar=False,
    )
    moment = Moment.zeros(d_in, torch.device("cpu"))
    moment.add(x.double())
    a0, b0 = inits.init_eva(moment.covariance(), d_out, rank, 0, "layer")
    assert_same_up_to_sign((a0, b0), (found["layer"], torch.zeros(d_out, rank)), 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_gas_singular_vectors_are_pefts_and_its_scales_the_papers(
    shape: tuple[int, int],
) -> None:
    net = Net(*shape)
    rank = min(shape) // 4  # then PEFT's randomised decomposition is a whole one
    config = LoraConfig(
        r=rank,
        lora_alpha=rank * SCALING,
        target_modules=["layer"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )
    x, target = tokens_for(shape[1]), random(40, shape[0], seed=9).float()
    preprocess_loraga(net, config, lambda: ((net(x) - target) ** 2).mean().backward())
    gradient = net.layer._peft_loraga_grad.double()
    layer = get_peft_model(net, config).base_model.model.layer
    a0, b0 = inits.init_lora_ga(gradient, rank)
    scale, values = shape[0] ** 0.25 / 4, torch.linalg.svdvals(gradient)[rank : 2 * rank]
    # PEFT leaves A0 unscaled and multiplies B0 by the singular values; signs of A0 and B0 are
    # apart, as their triplets.
    a_peft, b_peft = layer.lora_A.default.weight.detach(), layer.lora_B.default.weight.detach()
    none = torch.zeros(1, rank)
    assert_same_up_to_sign((a0 / scale, none.double()), (a_peft, none), 1e-4)
    assert_same_up_to_sign((b0.T * values[:, None], none.double()), (b_peft.T, none), 1e-4)
    torch.testing.assert_close(
        a0 @ a0.T, scale**2 * torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-10
    )
    torch.testing.assert_close(
        b0.T @ b0, scale**2 * torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: inits.init_lora_ga(random(7, 9), 4),
            "lora_ga takes 2 x 4 singular vectors and there are 7",
        ),
        (lambda: inits.init_lora_ga(torch.zeros(9, 9), 2), "gradient is zero"),
        (  # three tokens, and four vectors
            lambda: inits.init_lora_ga(random(9, 3) @ random(3, 8), 2),
            "lora_ga takes 2 x 2 singular vectors and its gradient has 3, the rest being rounding",
        ),
        (
            lambda: inits.init_corda(random(3, 4), torch.zeros(4, 4), 2, 1.0, "ipm"),
            "moment is zero",
        ),
    ],
    ids=["rank", "gradient", "tokens", "moment"],
)
def test_statistics_that_decide_nothing_are_refused(call: Callable, message: str) -> None:
    with pytest.raises(AstraError, match=message):
        call()
