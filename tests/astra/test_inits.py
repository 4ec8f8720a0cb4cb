"""Initial factors are what the paper's formulas say: B0 = V and A0 = V^T W; plain LoRA draws as PEFT does."""

import pytest
import torch
from torch import Tensor

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
