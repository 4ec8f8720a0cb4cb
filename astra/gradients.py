"""Gradients of the loss with respect to weights of modules, summed over calibration tokens.

For `y = W x + b` and tokens t the gradient is `dL/dW = sum_t (dL/dy_t) x_t^T`. Hooks form it from
the input x of the module and the gradient that reaches its output y. The base model stays frozen,
so that no engine stores, shards or reduces gradients of its weights.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from astra.moments import Batch, runs_on_relative_positions
from astra.windows import Window

Loss = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> the loss summed over the batch's labels that are not -100, or over its rows."""


@dataclass
class Gradient:
    """fp64 sums over the tokens whose loss is summed: those with a label that is not -100.

    Of rows with labels, over the rows.
    """

    total: Tensor  # (d_out, d_in), dL/dW, where L is the loss summed over these tokens
    count: Tensor  # (), number of these tokens, or rows

    @classmethod
    def zeros(cls, linear: nn.Linear, device: torch.device) -> "Gradient":
        """Return sums over no tokens."""
        # Not linear.weight.shape, which may be (0,) while the weight is sharded.
        shape = (linear.out_features, linear.in_features)
        total = torch.zeros(shape, dtype=torch.float64, device=device)
        count = torch.zeros((), dtype=torch.float64, device=device)
        return cls(total, count)

    def mean(self) -> Tensor:
        """Return the gradient of the mean loss: (d_out, d_in), fp64."""
        return self.total / self.count

    def to(self, device: torch.device) -> "Gradient":
        """Return the sums on `device`: these themselves if they are there."""
        return Gradient(self.total.to(device), self.count.to(device))

    def tensors(self) -> list[Tensor]:
        """Return all tensors that hold sums, in a fixed order."""
        return [self.total, self.count]


def sum_gradients(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    window: Window,
    loss: Loss,
    progress: Callable[[Sequence, str], Iterable] = lambda items, _: items,
) -> list[Gradient]:
    """Return this rank's sums over `batches` for each group of `window`.

    Runs a whole forward and backward pass for each batch. Collective for a sharded model. For the
    arguments see calibrate.calibrate_modules. Padding adds nothing, because no token with a label
    attends to it, nor does a row's head.
    """
    names = [name for group in window.groups for name in group.modules]
    device = batches[0]["input_ids"].device
    sums = {name: Gradient.zeros(linears[name], device) for name in names}
    with _accumulate_gradients(model, linears, sums), torch.enable_grad():
        for batch in progress(batches, "calibrate"):
            loss(model, batch).backward()
            # Of a new head, which is trained later: what is left would be a part of its first step.
            model.zero_grad(set_to_none=True)
            num_labels = _count_labels(batch)
            for gradient in sums.values():
                gradient.count += num_labels
    return list(sums.values())


def _count_labels(batch: Batch) -> Tensor:
    """Count the labels whose loss is summed."""
    if "row_labels" in batch:
        return batch["token_mask"].any(1).sum()
    # The logits at token t predict label t + 1, so the first label is not used.
    return (batch["labels"][:, 1:] != -100).sum()


@contextmanager
def _accumulate_gradients(
    model: nn.Module, linears: Mapping[str, nn.Linear], sums: Mapping[str, Gradient]
) -> Iterator[None]:
    """Within the context, let every backward pass add to the totals of `sums`."""

    on_positions = runs_on_relative_positions(model)

    def require_grad(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        # All parameters are frozen. A backward pass needs some tensor that requires a gradient.
        return output.requires_grad_()

    def make_hook(gradient: Gradient) -> Callable:
        def hook_output(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach().flatten(0, -2)
            if on_positions and not output.requires_grad:  # they come from frozen weights
                output.requires_grad_()

            def add_product(output_gradient: Tensor) -> None:
                dy = output_gradient.flatten(0, -2)
                gradient.total.addmm_(dy.double().T, x.double())

            output.register_hook(add_product)

        return hook_output

    handles = [model.get_input_embeddings().register_forward_hook(require_grad)]
    for name, gradient in sums.items():
        handles.append(linears[name].register_forward_hook(make_hook(gradient)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
