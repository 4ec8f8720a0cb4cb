"""astra.gradients: what hooks sum over a frozen model is what autograd gives for an unfrozen one.

Tiny random Llamas on the CPU. A few seconds.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astra.gradients import sum_gradients
from astra.moments import Batch, find_groups
from astra.windows import count_sum_bytes, make_plan
from tests.support.calibration import find_projections


def batches_of(size: int) -> list[Batch]:
    """Return seven rows in right-padded batches of `size`; their first 3 tokens have no label."""
    generator = torch.Generator().manual_seed(6)
    rows = [
        torch.randint(50, (length,), generator=generator) for length in (5, 9, 13, 6, 11, 7, 12)
    ]
    made = []
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        labels = [torch.cat([torch.full((3,), -100), row[3:]]) for row in chunk]
        ids = nn.utils.rnn.pad_sequence(chunk, batch_first=True)
        labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        made.append(Batch(input_ids=ids, token_mask=labels != -100, labels=labels))
    return made


def loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    labels = batch["labels"][:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_are_those_of_autograd_for_any_batch_size(
    size: int, make_llama: Callable[..., nn.Module]
) -> None:
    model = make_llama(torch.float64).requires_grad_(False)
    linears, batches = find_projections(model), batches_of(size)
    plan = make_plan(
        model, linears, find_groups(model, linears, batches[0], "gradient"), tokens=13 * size
    )
    (window,) = plan.windows
    found = sum_gradients(model, linears, batches, window, loss)
    assert sum(8 * (t.numel()) for g in found for t in g.tensors()) == window.sums_bytes
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())

    model.requires_grad_(True)
    tokens = sum(len(row) - 3 for batch in batches_of(1) for row in batch["input_ids"])
    (sum(loss(model, batch) for batch in batches_of(1)) / tokens).backward()
    for group, gradient in zip(window.groups, found, strict=True):
        (name,) = group.modules
        assert gradient.count == tokens
        wanted = linears[name].weight.grad
        # Llama's norms work in fp32, whatever the model's dtype.
        torch.testing.assert_close(
            gradient.mean(), wanted, rtol=0, atol=1e-6 * wanted.abs().max().item(), msg=name
        )


def test_windows_give_the_same_bits(make_llama: Callable[..., nn.Module]) -> None:
    model = make_llama().requires_grad_(False)
    linears, batches = find_projections(model), batches_of(2)
    groups = find_groups(model, linears, batches[0], "gradient")
    whole = make_plan(model, linears, groups, tokens=26, decomposition="matrix")
    memory = whole.working_bytes + sum(count_sum_bytes(group, linears) for group in groups) / 2
    plan = make_plan(model, linears, groups, tokens=26, memory=memory, decomposition="matrix")
    assert [len(window.groups) for window in plan.windows] == [7, 7]
    assert "a forward and a backward pass in each" in plan.describe()
    apart = [
        gradient
        for window in plan.windows
        for gradient in sum_gradients(model, linears, batches, window, loss)
    ]
    for one, other in zip(
        apart, sum_gradients(model, linears, batches, whole.windows[0], loss), strict=True
    ):
        assert torch.equal(one.total, other.total)
        assert one.total.any()
