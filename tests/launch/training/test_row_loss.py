"""Gradients of a row's loss, as LoRA-GA's calibration sums them, against autograd's.

On a base in bf16 the new head computes in fp32, as plain PyTorch does. 3 s.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astra.gradients import sum_gradients
from astra.moments import Batch, find_groups
from astra.targets import find_targets
from astra.windows import make_plan
from launch.data.batches import collate_rows
from launch.data.task_rows import prepare_rows
from launch.engines.base import load_pretrained
from launch.models.check import draw_weight
from launch.training.loss import has_bf16_products
from launch.training.row_loss import RowLoss, compute_row_losses, sum_row_label_loss
from launch.training.trainable import attach_trainable
from tests.support.classifiers import TARGETS, load_recipe, make_recipe


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("kind", TARGETS)
def test_gradients_are_those_of_the_rows_own_losses(
    kind: str, regression: bool, tmp_path: Path
) -> None:
    recipe = load_recipe(make_recipe(tmp_path, kind, regression))
    checked, rows, _ = prepare_rows(recipe, tmp_path / "base")
    tokens, model = rows.open_tokens(), load_pretrained(checked, torch.float32).eval()
    for name in checked.new_weights:
        drawn = draw_weight(checked.folder, name, 1, checked.head)
        model.get_parameter(name).data.copy_(drawn)
    model.requires_grad_(False)
    for name in checked.head_parameters:
        model.get_parameter(name).requires_grad_(True)
    linears = find_targets(model, recipe.adapter.targets)
    batches = []
    for examples in ([0, 1, 2, 3], [4, None, None, None]):  # None fills up, and does not count
        batch = collate_rows(tokens, examples)
        is_real = batch.attention_mask.bool() & batch.weights.bool()[:, None]
        batches.append(Batch(**batch.inputs(), token_mask=is_real, row_labels=batch.labels))
    groups = find_groups(model, linears, batches[0], "gradient")
    plan = make_plan(model, linears, groups, tokens=64, decomposition="matrix")
    found = sum_gradients(model, linears, batches, plan.windows[0], sum_row_label_loss)
    assert all(parameter.grad is None for parameter in model.parameters())  # training starts anew
    for linear in linears.values():
        linear.weight.requires_grad_(True)
    for example in range(5):  # each row alone, so without padding
        row = collate_rows(tokens, [example])
        compute_row_losses(model(**row.inputs()).logits, row.labels).sum().backward()
    names = [name for group in groups for name in group.modules]
    assert len(names) == len(linears)
    for name, gradient in zip(names, found, strict=True):
        wanted = linears[name].weight.grad.double() / 5
        atol = 1e-5 * wanted.abs().max().item()
        torch.testing.assert_close(gradient.mean(), wanted, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("kind", TARGETS)
def test_a_new_head_on_a_base_in_bf16_computes_in_fp32(
    kind: str, regression: bool, tmp_path: Path
) -> None:
    recipe = load_recipe(make_recipe(tmp_path, kind, regression))
    checked, rows, _ = prepare_rows(recipe, tmp_path / "base")
    base = load_pretrained(checked, torch.bfloat16).requires_grad_(False)
    model = attach_trainable(base, recipe.adapter, head=checked.head_parameters).eval()
    torch.manual_seed(1)
    for name in checked.head_parameters:
        nn.init.normal_(base.get_parameter(name))
    layers = {base.get_submodule(name.rpartition(".")[0]) for name in checked.head_parameters}
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []
    for layer in layers:
        layer.register_forward_hook(
            lambda layer, inputs, output: calls.append((layer, *inputs, output))
        )
    assert has_bf16_products(model)
    RowLoss(model)(*collate_rows(rows.open_tokens(), [0, 1, 2, 3]).arguments()).backward()
    assert {layer for layer, _, _ in calls} == layers
    for layer, hidden, output in calls:
        assert torch.equal(output, F.linear(hidden.float(), layer.weight, layer.bias))
        assert not torch.equal(output, output.bfloat16().float())
        assert layer.weight.grad.dtype == torch.float32
