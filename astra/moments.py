"""Second moments of layer outputs, summed in fp64 over the real tokens of a calibration set.

For a linear layer `y = W x + b` the uncentred second moment is `C = 1/n sum_t y_t y_t^T` (arXiv 2602.19111). It is
defined from the layer's actual input in the model's dtype and the stored `W`, with the product in fp64, not from the
rounded output. Two statistics give it, and each group of modules keeps the one with fewer numbers:

* input:  `sum x x^T` and `sum x`, shared by all modules that read the same tensor (q, k, v; gate, up);
* output: `sum y y^T`, one for each module.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from astra.errors import AstraError


class Batch(TypedDict):
    """One right-padded calibration batch; both are (rows, tokens).

    No attention mask: in a causal model no real token sees the padding after it.
    """

    input_ids: Tensor
    counted: Tensor  # bool, False at padding and in dummy rows


@dataclass
class Moment:
    """fp64 sums over the counted tokens of one vector `z` of size d."""

    outer: Tensor  # (d, d), sum z z^T
    total: Tensor  # (d,), sum z
    count: Tensor  # (), number of tokens

    @classmethod
    def zeros(cls, size: int, device: torch.device) -> "Moment":
        def new(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(new(size, size), new(size), new())

    def add(self, vectors: Tensor) -> None:
        """Add the rows of `vectors`, (tokens, d) in fp64."""
        self.outer.addmm_(vectors.T, vectors)
        self.total += vectors.sum(0)
        self.count += len(vectors)


@dataclass
class Statistic:
    """What is summed for a group of modules: their shared input, or the output of the group's one module."""

    modules: list[str]
    of: str  # "input" or "output"
    moment: Moment


@contextmanager
def _hooks(linears: Mapping[str, nn.Linear], hook) -> Iterator[None]:  # noqa: ANN001 (a closure over the name)
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: hook(name, module, args[0]))
        for name, module in linears.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def find_groups(model: nn.Module, linears: Mapping[str, nn.Linear], batch: Batch) -> list[list[str]]:
    """Names of the modules, in the order they run, grouped by the input tensor they share in a real forward pass.

    A module joins the group of the module that ran just before it when it is given the same memory (engines may wrap
    one tensor in several objects). Raises AstraError if a module does not run, or runs more than once.
    """
    groups: list[list[str]] = []
    last: list[Tensor] = []

    def look(name: str, module: nn.Linear, x: Tensor) -> None:
        if any(name in group for group in groups):
            raise AstraError(f"{name} runs more than once in a forward pass; take it out of adapter.targets")
        if last and (x.data_ptr(), x.shape, x.stride()) == (last[0].data_ptr(), last[0].shape, last[0].stride()):
            groups[-1].append(name)
        else:
            groups.append([name])
        last[:] = [x]  # kept, so that its memory is not given to another tensor

    with _hooks(linears, look):
        model(input_ids=batch["input_ids"], use_cache=False)
    idle = set(linears) - {name for group in groups for name in group}
    if idle:
        raise AstraError(f"{min(idle)} does not run in a forward pass; take it out of adapter.targets")
    return groups


def plan(groups: list[list[str]], linears: Mapping[str, nn.Linear], device: torch.device) -> list[Statistic]:
    """The statistics to keep: for each group the one that holds fewer numbers (a tie goes to the input)."""
    statistics = []
    for names in groups:
        # The layers' attributes: a sharded weight's own shape may be (0,).
        d_in, sizes = linears[names[0]].in_features, [linears[name].out_features for name in names]
        if d_in**2 <= sum(d_out**2 for d_out in sizes):
            statistics.append(Statistic(names, "input", Moment.zeros(d_in, device)))
        else:
            statistics += [
                Statistic([name], "output", Moment.zeros(d_out, device))
                for name, d_out in zip(names, sizes, strict=True)
            ]
    return statistics


@torch.no_grad()
def accumulate(
    model: nn.Module, linears: Mapping[str, nn.Linear], statistics: list[Statistic], batches: Iterable[Batch]
) -> None:
    """Run `batches` through `model` and add this rank's part of every statistic.

    The hooks run when an engine has gathered the module's weight, so `module.weight` is whole in them.
    """
    by_leader = {statistic.modules[0]: statistic for statistic in statistics}
    counted: Tensor = torch.empty(0)

    def add(name: str, module: nn.Linear, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) != counted.numel():
            raise AstraError(
                f"{name} is given {len(rows)} vectors for {counted.numel()} tokens; it cannot be calibrated"
            )
        rows = rows[counted].double()
        statistic = by_leader[name]
        if statistic.of == "output":
            rows = rows @ module.weight.double().T
            if module.bias is not None:
                rows += module.bias.double()
        statistic.moment.add(rows)

    with _hooks({name: linears[name] for name in by_leader}, add):
        for batch in batches:
            counted = batch["counted"].flatten()
            model(input_ids=batch["input_ids"], use_cache=False)


def distributed() -> bool:
    """Whether there are other ranks to sum over; without a process group there are none."""
    return dist.is_available() and dist.is_initialized()


def all_reduce(statistics: list[Statistic]) -> None:
    """Sum every statistic over the ranks, in place, in fp64 and in the same order on every rank.

    The sum over ranks of partial sums over tokens is the sum over all tokens, so the result is that of one process up
    to the order of fp64 additions.
    """
    if not distributed():
        return
    for statistic in statistics:
        for tensor in (statistic.moment.outer, statistic.moment.total, statistic.moment.count):
            dist.all_reduce(tensor)


def factor(statistic: Statistic, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """The output second moment `C` of one module as `(Q, small)` with `C = Q small Q^T`, in fp64.

    `Q` has orthonormal columns, (d_out, k), or is None for the identity. With `W' = [W b]` and the second moment `S'`
    of `[x 1]`, `C = W' S' W'^T` (method: shared inputs). Where W' is taller than wide, `C` has rank at most
    k = d_in (+ 1): then `W' = Q R` and `small = R S' R^T`, (k, k), so that the d_out - k zero eigenvalues are zero by
    construction and not by rounding.

    Args:
        statistic: the summed statistic of the module's group.
        weight: (d_out, d_in), any dtype. bias: (d_out,) or None.
    """
    moment = statistic.moment
    second = moment.outer / moment.count
    if statistic.of == "output":
        return None, (second + second.T) / 2
    wide = weight.double()
    if bias is not None:
        mean = (moment.total / moment.count)[:, None]
        second = torch.cat([torch.cat([second, mean], 1), torch.cat([mean.T, torch.ones_like(mean[:1])], 1)])
        wide = torch.cat([wide, bias.double()[:, None]], 1)
    basis = None
    if wide.shape[0] > wide.shape[1]:
        basis, wide = torch.linalg.qr(wide)
    small = wide @ second @ wide.T
    return basis, (small + small.T) / 2
