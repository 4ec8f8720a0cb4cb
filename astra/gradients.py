"""Gradients of the training loss with respect to the weights of modules, summed in fp64 over a calibration set.

The base is frozen and stays so: `dL/dW = sum_t (dL/dy_t) x_t^T` is formed in hooks from what a module was given and
from the gradient of what it gave, so that no engine holds, shards or reduces gradients of weights.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from astra.moments import Batch
from astra.windows import Window

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, input_ids, labels) -> the loss summed over the labels that are not -100."""


@dataclass
class Gradient:
    """fp64 sums over the tokens where the loss counts; `total / count` is the gradient of their mean loss."""

    total: Tensor  # (d_out, d_in)
    count: Tensor  # (), number of those tokens

    @classmethod
    def zeros(cls, linear: nn.Linear, device: torch.device) -> "Gradient":
        shape = linear.out_features, linear.in_features  # a sharded weight's own may be (0,)
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in (shape, ())))

    def mean(self) -> Tensor:
        return self.total / self.count

    def tensors(self) -> list[Tensor]:
        return [self.total, self.count]


def gradients(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    window: Window,
    loss: Loss,
    progress: Callable[[Sequence, str], Iterable] = lambda items, _: items,
) -> list[Gradient]:
    """This rank's sums over `batches` for each of the window's modules, one whole forward and backward pass a batch.

    Collective for a sharded model; see calibrate.calibrate. Rows of padding get no gradient: nothing that the loss
    counts reads them.
    """
    names = [name for group in window.groups for name in group.modules]
    sums = [Gradient.zeros(linears[name], batches[0]["input_ids"].device) for name in names]
    with _adding(model, linears, dict(zip(names, sums, strict=True))), torch.enable_grad():
        for batch in progress(batches, "calibrate"):
            labels = batch["labels"]
            loss(model, batch["input_ids"], labels).backward()
            for of_module in sums:
                of_module.count += (labels[:, 1:] != -100).sum()
    return sums


@contextmanager
def _adding(
    model: nn.Module, linears: Mapping[str, nn.Linear], sums: Mapping[str, Gradient]
) -> Iterator[None]:
    """Within it every backward pass adds to `sums`."""

    def from_here(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output.requires_grad_()  # else nothing of a frozen model would have a gradient

    def watch(of: Gradient) -> Callable:
        def forward(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach().flatten(0, -2)

            def backward(gradient: Tensor) -> None:
                of.total.addmm_(gradient.flatten(0, -2).double().T, x.double())

            output.register_hook(backward)

        return forward

    handles = [model.get_input_embeddings().register_forward_hook(from_here)]
    handles += [linears[name].register_forward_hook(watch(of)) for name, of in sums.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
