"""astra.windows: windows give what one window gives, within a budget and in one forward pass.

Tiny random Llama and Qwen3 models on the CPU. A few seconds.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from astra.calibrate import Solution, calibrate_modules, compute_principal_angles
from astra.errors import AstraError
from astra.moments import Batch, find_groups
from astra.weights import TorchWeights
from astra.windows import (
    CalibrationPlan,
    count_moment_bytes,
    find_layers,
    make_plan,
    skip_layers_outside,
)
from tests.support.calibration import find_projections, make_solver

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def make_model(kind: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    layers = ["full_attention", "sliding_attention"] * 2 + [
        "full_attention"
    ]  # looked up by layer while it runs
    config = Qwen3Config(
        **SIZES,
        head_dim=4,
        layer_types=layers,
        sliding_window=3,
        use_sliding_window=True,
        max_window_layers=0,
    )
    return Qwen3ForCausalLM(config).eval()


def make_batches(count: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        ids = torch.randint(50, (2, 9 + i), generator=generator)
        made.append(
            Batch(input_ids=ids, token_mask=torch.rand(ids.shape, generator=generator) < 0.9)
        )
    return made


def plan_of(model: nn.Module, memory: float | None = None, parts: int = 1) -> CalibrationPlan:
    linears, batches = find_projections(model), make_batches()
    return make_plan(
        model,
        linears,
        find_groups(model, linears, batches[0]),
        tokens=24,
        num_parts=parts,
        memory=memory,
    )


def run(
    model: nn.Module, parts: list[list[Batch]], plan: CalibrationPlan, start: int = 0
) -> list[dict[str, Solution]]:
    linears, lora_ranks = find_projections(model), dict.fromkeys(find_projections(model), 3)
    return list(
        calibrate_modules(
            model,
            linears,
            parts,
            TorchWeights(),
            plan,
            make_solver("smallest", 0),
            lora_ranks=lora_ranks,
            solve_device=torch.device("cpu"),
            start=start,
        )
    )


def budget(layers: int, plan: CalibrationPlan, parts: int = 1) -> float:
    return (
        layers * parts * (3 * count_moment_bytes(16) + count_moment_bytes(16)) + plan.working_bytes
    )


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(("layers", "windows"), [(1, 5), (2, 3), (4, 2)])
def test_windows_give_the_same_bits_as_one_window(kind: str, layers: int, windows: int) -> None:
    model = make_model(kind)
    whole = plan_of(model)
    plan = plan_of(model, budget(layers, whole))
    assert len(plan.windows) == windows
    assert plan.peak_bytes <= budget(layers, whole)
    (wanted,) = run(model, [make_batches()], whole)
    found = {
        name: one for window in run(model, [make_batches()], plan) for name, one in window.items()
    }
    assert found.keys() == wanted.keys()
    assert len(found) == 5 * 7
    for name, one in wanted.items():
        for field in ("vectors", "values", "spectrum"):
            assert torch.equal(found[name][field], one[field]), name
    assert all(type(layer) is type(model.model.layers[0]) for layer in model.model.layers)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_all_windows_together_run_each_layer_once_a_batch() -> None:
    model = make_model()
    plan = plan_of(model, budget(2, plan_of(model)))
    calls = [0] * 5
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    run(model, [make_batches()], plan)
    assert calls == [4] * 5


@pytest.mark.parametrize("start", [1, 2])
def test_a_calibration_can_resume_after_a_window(start: int) -> None:
    model = make_model()
    plan = plan_of(model, budget(2, plan_of(model)))
    wanted, found = (run(model, [make_batches()], plan, i) for i in (0, start))
    assert len(found) == 3 - start
    for after, before in zip(found, wanted[start:], strict=True):
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name]["vectors"], before[name]["vectors"]) for name in after)


def test_halves_give_the_whole_and_the_angle_between_their_tails() -> None:
    model, batches = make_model(), make_batches()
    halves = [batches[:2], batches[2:]]
    plan = plan_of(model, budget(2, plan_of(model, parts=2), parts=2), parts=2)
    assert len(plan.windows) == 3
    found = {name: one for window in run(model, halves, plan) for name, one in window.items()}
    whole, first, second = (run(model, [part], plan_of(model))[0] for part in (batches, *halves))
    for name, one in found.items():
        torch.testing.assert_close(one["values"], whole[name]["values"], rtol=1e-9, atol=1e-15)
        angles = compute_principal_angles(first[name]["vectors"], second[name]["vectors"])
        torch.testing.assert_close(one["angles"], angles, rtol=0, atol=1e-7)
        if name.endswith(("gate_proj", "up_proj")):  # 24 of 40 directions are W's own
            assert not one["angles"].any()
        else:
            assert one["angles"].max() > 0.01


def test_principal_angles_are_exact_at_both_ends() -> None:
    basis = torch.linalg.qr(
        torch.randn(9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).Q
    angles = torch.tensor([1e-12, 1e-3, 0.7, math.pi / 2], dtype=torch.float64)
    a = basis[:, :4]
    b = a * angles.cos() + basis[:, 4:8] * angles.sin()
    turned = torch.linalg.qr(
        torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ).Q
    torch.testing.assert_close(
        compute_principal_angles(a, b @ turned), angles, rtol=1e-3, atol=1e-15
    )


def test_a_budget_that_no_layer_fits_is_refused_with_what_would_do() -> None:
    model = make_model()
    least = budget(1, plan_of(model))
    with pytest.raises(AstraError, match=r"GiB is below the .* GiB that one layer takes") as error:
        plan_of(model, least - 1)
    assert error.value.subject == "memory"
    assert len(plan_of(model, least).windows) == 5


def test_targets_outside_of_a_list_of_layers_cannot_be_taken_in_windows() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(50, 16), nn.Linear(16, 16)

        def forward(self, input_ids: Tensor, **_: object) -> Tensor:
            return self.b(self.a(nn.functional.one_hot(input_ids, 50).float()))

    model = Flat()
    linears = {"a": model.a, "b": model.b}
    groups = find_groups(model, linears, make_batches()[0])
    assert find_layers(model, linears) is None
    assert make_plan(model, linears, groups, tokens=24).layers is None
    with pytest.raises(AstraError, match="set no limit"):
        make_plan(model, linears, groups, tokens=24, memory=100)


def test_layers_that_are_not_in_the_window_are_put_back_after_a_fault(
    make_llama: Callable[..., nn.Module],
) -> None:
    model = make_llama()
    layers = list(model.model.layers)
    with (
        pytest.raises(RuntimeError, match="planted"),
        skip_layers_outside(model.model.layers, range(1), None),
    ):
        assert model.model.layers[1] is not layers[1]
        raise RuntimeError("planted")
    assert list(model.model.layers) == layers
