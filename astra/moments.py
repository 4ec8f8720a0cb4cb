"""Second moments of layer inputs and outputs, summed in fp64 over the real tokens of a calibration set.

For a linear layer `y = W x + b` the uncentred second moment is `C = 1/n sum_t y_t y_t^T` (arXiv 2602.19111). It is
defined from the layer's actual input in the model's dtype and the stored `W`, with the product in fp64, not from the
rounded output. Two statistics give it, and each group of modules keeps the one with fewer numbers:

* input:  `sum x x^T` and `sum x`, shared by all modules that read the same tensor (q, k, v; gate, up);
* output: `sum y y^T`, one for each module.

Methods other than Astra need the input's, or something else altogether: see Statistic.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, NotRequired, Protocol, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from astra.errors import AstraError

Statistic = Literal["input", "output", "scaled output", "gradient", "weight"]
"""What is known of modules before they are solved: the second moment of what they read; of what they give; of what they
give over each batch's largest number, as Astra's authors' code has it; the gradient of the loss with respect to the
weight (see gradients); or the weight alone, for which nothing is summed."""
WIDTH = 256  # columns that are summed at once; a whole multiple keeps the triangle's overhead at WIDTH / 2d


class Batch(TypedDict):
    """One right-padded calibration batch; all are (rows, tokens).

    As a rule there is no attention mask: in a causal model no real token sees the padding after it.
    """

    input_ids: Tensor
    counted: Tensor  # bool, False at padding and in dummy rows
    attention_mask: NotRequired[Tensor]  # 0 at padding, where the padding itself is counted
    labels: NotRequired[
        Tensor
    ]  # for gradients: the token ids where the loss counts, -100 elsewhere


@dataclass
class Moment:
    """fp64 sums over the counted tokens of one vector `z` of size d.

    `sum z z^T` is symmetric: only its lower triangle is summed, kept and sent, in columns of blocks.
    """

    columns: list[
        Tensor
    ]  # of the rows from i down: (d - i, min(WIDTH, d - i)) for i = 0, WIDTH, 2 WIDTH, ...
    total: Tensor  # (d,), sum z
    count: Tensor  # (), number of tokens

    @classmethod
    def zeros(cls, size: int, device: torch.device) -> "Moment":
        def new(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        columns = [new(size - i, min(WIDTH, size - i)) for i in range(0, size, WIDTH)]
        return cls(columns, new(size), new())

    def tensors(self) -> list[Tensor]:
        return [*self.columns, self.total, self.count]

    def add(self, vectors: Tensor) -> None:
        """Add the rows of `vectors`, (tokens, d) in fp64."""
        for i, column in zip(range(0, len(self.total), WIDTH), self.columns, strict=True):
            column.addmm_(vectors[:, i:].T, vectors[:, i : i + WIDTH])
        self.total += vectors.sum(0)
        self.count += len(vectors)

    def __add__(self, other: "Moment") -> "Moment":
        columns = [a + b for a, b in zip(self.columns, other.columns, strict=True)]
        return Moment(columns, self.total + other.total, self.count + other.count)

    def covariance(self) -> Tensor:
        """`1/n sum (z - mean) (z - mean)^T`: (d, d)."""
        mean = self.total / self.count
        return self.second() - mean[:, None] * mean

    def second(self) -> Tensor:
        """`1/n sum z z^T`: (d, d)."""
        return self.outer() / self.count

    def outer(self) -> Tensor:
        """`sum z z^T`, whole: (d, d), symmetric to the bit."""
        size = len(self.total)
        whole = self.total.new_empty(size, size)
        for i, column in zip(range(0, size, WIDTH), self.columns, strict=True):
            end = min(i + WIDTH, size)
            whole[i:, i:end] = column
            whole[i:end, end:] = column[end - i :].T
            diagonal = whole[i:end, i:end]
            diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)
        return whole


class Group(NamedTuple):
    """Modules that read the same tensor, or one module, and what is summed for them."""

    modules: tuple[str, ...]
    of: Statistic
    size: int  # d of the moment; 0 where it is not one


@contextmanager
def _hooks(linears: Mapping[str, nn.Linear], hook) -> Iterator[None]:  # noqa: ANN001 (a closure over the name)
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: hook(name, module, args[0])
        )
        for name, module in linears.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def forward(model: nn.Module, batch: Batch) -> None:
    """One forward pass, of which only the hooks' work is wanted: the head computes a single token's logits."""
    model(
        input_ids=batch["input_ids"],
        attention_mask=batch.get("attention_mask"),
        use_cache=False,
        logits_to_keep=1,
    )


@torch.no_grad()
def find_groups(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batch: Batch | None,
    of: Statistic = "output",
) -> list[Group]:
    """The statistics to keep of the modules `linears`, in the order they run, seen in a real forward pass.

    A module joins the group of the module that ran just before it when it is given the same memory (engines may wrap
    one tensor in several objects). Where the outputs' moments are wanted, a group keeps the statistic with fewer
    numbers that gives them; a tie goes to the input. Weights alone need no pass, nor a batch.

    Raises AstraError if a module does not run, or runs more than once.
    """
    if of == "weight":
        return [Group((name,), of, 0) for name in linears]
    shared: list[list[str]] = []
    last: list[Tensor] = []

    def look(name: str, module: nn.Linear, x: Tensor) -> None:
        if any(name in names for names in shared):
            raise AstraError(
                f"{name} runs more than once in a forward pass; take it out of adapter.targets"
            )
        if last and _same_memory(x, last[0]):
            shared[-1].append(name)
        else:
            shared.append([name])
        last[:] = [x]  # kept, so that its memory is not given to another tensor

    with _hooks(linears, look):
        forward(model, batch)
    idle = set(linears) - {name for names in shared for name in names}
    if idle:
        raise AstraError(
            f"{min(idle)} does not run in a forward pass; take it out of adapter.targets"
        )
    groups = []
    for names in shared:
        # The layers' attributes: a sharded weight's own shape may be (0,).
        d_in, sizes = linears[names[0]].in_features, [linears[name].out_features for name in names]
        if of in ("scaled output", "gradient"):
            size = {
                name: linears[name].out_features if of == "scaled output" else 0 for name in names
            }
            groups += [Group((name,), of, size[name]) for name in names]
        elif of == "input" or d_in**2 <= sum(d_out**2 for d_out in sizes):
            groups.append(Group(tuple(names), "input", d_in))
        else:
            groups += [
                Group((name,), "output", d_out) for name, d_out in zip(names, sizes, strict=True)
            ]
    return groups


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two living tensors are the same numbers in the same place; on PyTorch's fake tensors too."""
    same_storage = a.untyped_storage() is b.untyped_storage()
    return same_storage and (a.storage_offset(), a.shape, a.stride()) == (
        b.storage_offset(),
        b.shape,
        b.stride(),
    )


@contextmanager
def accumulating(
    linears: Mapping[str, nn.Linear], groups: Sequence[Group], moments: Sequence[Moment]
) -> Iterator:
    """Within it every forward pass adds its tokens to `moments`, one for each of `groups`.

    It yields a function that is to be told each batch's `counted` before the batch runs. The hooks run when an engine
    has gathered the module's weight, so `module.weight` is whole in them.
    """
    by_leader = {
        group.modules[0]: (group, moment) for group, moment in zip(groups, moments, strict=True)
    }
    counted: list[Tensor] = []

    def add(name: str, module: nn.Linear, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) != counted[0].numel():
            raise AstraError(
                f"{name} is given {len(rows)} vectors for {counted[0].numel()} tokens; it cannot be calibrated"
            )
        rows = rows[counted[0]].double()
        group, moment = by_leader[name]
        if group.of != "input":
            rows = rows @ module.weight.double().T
            if module.bias is not None:
                rows += module.bias.double()
        if group.of == "scaled output" and len(rows):
            rows /= rows.max().abs()
        moment.add(rows)

    def count(of_batch: Tensor) -> None:
        counted[:] = [of_batch.flatten()]

    with _hooks({name: linears[name] for name in by_leader}, add):
        yield count


def distributed() -> bool:
    """Whether there are other ranks to sum over; without a process group there are none."""
    return dist.is_available() and dist.is_initialized()


class Summed(Protocol):
    """What is summed over tokens, and so over ranks."""

    def tensors(self) -> list[Tensor]: ...


def reduce(sums: Iterable[Summed], owners: Iterable[int]) -> None:
    """Sum each of `sums` over the ranks, in place on its owner rank, in fp64 and in the same order on every rank.

    The sum over ranks of partial sums over tokens is the sum over all tokens, so the result is that of one process up
    to the order of fp64 additions. Only the owner solves with it: half of what an all-reduce would send.
    """
    if not distributed():
        return
    for of_group, owner in zip(sums, owners, strict=True):
        for tensor in of_group.tensors():
            dist.reduce(tensor, owner)
