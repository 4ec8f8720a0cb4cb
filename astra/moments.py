"""Second moments of the inputs or outputs of modules, summed in fp64 over tokens.

For a module, a linear layer `y = W x + b`, Astra needs the uncentred second moment of its outputs
over n tokens, `C = 1/n sum_t y_t y_t^T` (arXiv 2602.19111). Here y is computed in fp64 from the
stored W and b and the input x that the module really receives, in the model's dtype. The module's
own output is not used, because it is rounded.

C can be formed from either of two sums (see output_moment):

* "input": `sum_t x_t x_t^T` and `sum_t x_t`. Modules that read the same tensor share it: q, k and
  v; gate and up.
* "output": `sum_t y_t y_t^T`, one for each module.

`find_groups` finds the modules that share an input and takes, for each such group, the kind of sum
that needs fewer numbers. `accumulate_moments` adds the tokens of each forward pass to the sums.
reduction.reduce_sums adds up the ranks' sums.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, NotRequired, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from astra.errors import AstraError

Statistic = Literal["input", "output", "scaled output", "gradient", "weight"]
"""Which kind of sum a module needs before it is solved.

input: second moment of the module's inputs. output: second moment of its outputs. scaled output:
the same, the outputs y of each batch divided by |max(y)|, as in the code of Astra's authors.
gradient: gradient of the loss with respect to the weight (see astra.gradients). weight: no sum; the
method needs the weight alone.
"""

# Columns of a moment that are summed by one product. Wider blocks compute more numbers above the
# diagonal, narrower blocks are slower.
BLOCK_WIDTH = 256


class Batch(TypedDict):
    """One right-padded calibration batch; every tensor is (sequences, tokens).

    An attention mask is rarely needed: in a causal model no real token attends to the padding that
    follows it. An encoder's tokens would, so rows with labels always have one.
    """

    input_ids: Tensor  # int64
    token_mask: Tensor  # bool: the tokens to sum over; False at padding and in dummy sequences
    attention_mask: NotRequired[Tensor]  # 0 at padding; needed if token_mask is True at padding
    labels: NotRequired[Tensor]  # for gradients: token ids where the loss is summed, else -100
    token_type_ids: NotRequired[Tensor]  # int64; where the model takes them
    # (sequences,): classes or numbers. A batch with them is a sequence classifier's.
    row_labels: NotRequired[Tensor]


@dataclass
class Moment:
    """fp64 sums over tokens t of a vector z_t of size d: `sum z z^T`, `sum z` and their number.

    `sum z z^T` is symmetric. Only its lower triangle is computed, stored and sent, in blocks of
    BLOCK_WIDTH columns.
    """

    # For i = 0, BLOCK_WIDTH, 2 BLOCK_WIDTH, ...: rows i to d of columns i to i + BLOCK_WIDTH.
    blocks: list[Tensor]
    total: Tensor  # (d,), sum z
    count: Tensor  # (), number of tokens n

    @classmethod
    def zeros(cls, size: int, device: torch.device) -> "Moment":
        """Return sums over no tokens, for vectors of `size`."""
        blocks = []
        for i in range(0, size, BLOCK_WIDTH):
            shape = (size - i, min(BLOCK_WIDTH, size - i))
            blocks.append(torch.zeros(shape, dtype=torch.float64, device=device))
        total = torch.zeros(size, dtype=torch.float64, device=device)
        count = torch.zeros((), dtype=torch.float64, device=device)
        return cls(blocks, total, count)

    def tensors(self) -> list[Tensor]:
        """Return all tensors that hold sums, in a fixed order."""
        return [*self.blocks, self.total, self.count]

    def to(self, device: torch.device) -> "Moment":
        """Return the sums on `device`: these themselves if they are there."""
        blocks = [block.to(device) for block in self.blocks]
        return Moment(blocks, self.total.to(device), self.count.to(device))

    def add(self, vectors: Tensor) -> None:
        """Add the rows of `vectors`, (tokens, d), fp64."""
        for i, block in zip(range(0, len(self.total), BLOCK_WIDTH), self.blocks, strict=True):
            block.addmm_(vectors[:, i:].T, vectors[:, i : i + BLOCK_WIDTH])
        self.total += vectors.sum(0)
        self.count += len(vectors)

    def __add__(self, other: "Moment") -> "Moment":
        """Return the sums over the tokens of both."""
        blocks = [a + b for a, b in zip(self.blocks, other.blocks, strict=True)]
        return Moment(blocks, self.total + other.total, self.count + other.count)

    def covariance(self) -> Tensor:
        """Return `1/n sum (z - mean) (z - mean)^T`: (d, d), fp64."""
        mean = self.total / self.count
        return self.second_moment() - mean[:, None] * mean

    def second_moment(self) -> Tensor:
        """Return `1/n sum z z^T`: (d, d), fp64."""
        return self.outer_sum() / self.count

    def outer_sum(self) -> Tensor:
        """Return `sum z z^T`, both triangles: (d, d), fp64, symmetric to the last bit."""
        size = len(self.total)
        whole = self.total.new_empty(size, size)
        for i, block in zip(range(0, size, BLOCK_WIDTH), self.blocks, strict=True):
            end = min(i + BLOCK_WIDTH, size)
            whole[i:, i:end] = block
            whole[i:end, end:] = block[end - i :].T
            # The square on the diagonal was summed whole, and rounding can differ between its two
            # triangles: keep the lower one.
            diagonal = whole[i:end, i:end]
            diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)
        return whole


class Group(NamedTuple):
    """Modules that share one statistic: those that read the same tensor, or a single module."""

    modules: tuple[str, ...]  # in the order they run
    statistic: Statistic
    size: int  # d of its Moment; 0 if its sums are not a Moment


def get_row_inputs(batch: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Return the arguments of a sequence classifier's forward pass that are in `batch`."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: batch[name] for name in names if batch.get(name) is not None}


def run_forward(model: nn.Module, batch: Batch, linears: Mapping[str, nn.Linear]) -> None:
    """Run one forward pass for the hooks on `linears` alone.

    Logits are computed for the last token only, unless the head is one of them.
    """
    if "row_labels" in batch:
        model(**get_row_inputs(batch))
        return
    options = {}
    if not _contain_head(linears, model):
        # Not the number 1, with which Gemma 4 runs its later layers on the last token only.
        length = batch["input_ids"].shape[1]
        options["logits_to_keep"] = torch.arange(
            length - 1, length, device=batch["input_ids"].device
        )
    model(
        input_ids=batch["input_ids"],
        attention_mask=batch.get("attention_mask"),
        use_cache=False,
        **options,
    )


def _contain_head(linears: Mapping[str, nn.Linear], model: nn.Module) -> bool:
    """Tell whether one of `linears` is the output head, or inside PEFT's layer in its place."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    return head is not None and not set(head.modules()).isdisjoint(linears.values())


@torch.no_grad()
def find_groups(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batch: Batch | None,
    statistic: Statistic = "output",
) -> list[Group]:
    """Return the groups of `linears`, in the order they run in a forward pass of `batch`.

    Collective for a sharded model.

    Args:
        batch: may be None for "weight", which needs no forward pass.
        statistic: what the method needs. For "output", modules that read the same tensor become
            one group with the statistic "input" if one sum over inputs has no more numbers than
            their sums over outputs together.

    Raises:
        AstraError: a module does not run, or runs more than once.
    """
    if statistic == "weight":
        return [Group((name,), statistic, 0) for name in linears]
    groups: list[Group] = []
    for names in _find_shared_inputs(model, linears, batch):
        # in_features, because a sharded weight's own shape may be (0,).
        d_in = linears[names[0]].in_features
        sizes = [linears[name].out_features for name in names]
        # sum x x^T has d_in^2 numbers, sum y y^T has d_out^2 for each module.
        is_input_smaller = d_in**2 <= sum(d_out**2 for d_out in sizes)
        if statistic == "gradient":
            groups += [Group((name,), "gradient", 0) for name in names]
        elif statistic == "input" or (statistic == "output" and is_input_smaller):
            groups.append(Group(tuple(names), "input", d_in))
        else:
            for name, size in zip(names, sizes, strict=True):
                groups.append(Group((name,), statistic, size))
    return groups


def _find_shared_inputs(
    model: nn.Module, linears: Mapping[str, nn.Linear], batch: Batch
) -> list[list[str]]:
    """Return lists of modules that read the same tensor, by name, in the order they run."""
    shared: list[list[str]] = []
    seen: set[str] = set()
    last_input: Tensor | None = None
    runs_on_positions = runs_on_relative_positions(model)

    def record_input(name: str, module: nn.Linear, x: Tensor) -> None:
        nonlocal last_input
        if name in seen and runs_on_positions:
            return
        if name in seen:
            raise AstraError(
                f"{name} runs more than once in a forward pass; leave it out", "targets"
            )
        seen.add(name)
        if last_input is not None and _is_same_memory(x, last_input):
            shared[-1].append(name)
        else:
            shared.append([name])
        last_input = x  # kept alive, so that no other tensor is given its memory

    with _register_hooks(linears, record_input):
        run_forward(model, batch, linears)
    not_run = set(linears) - seen
    if not_run:
        raise AstraError(f"{min(not_run)} does not run in a forward pass; leave it out", "targets")
    return shared


def runs_on_relative_positions(model: nn.Module) -> bool:
    """Return whether modules run once more on embeddings of relative positions, after the tokens.

    DeBERTa-v3's query_proj and key_proj do. Those embeddings are no tokens, and are not counted.
    """
    return bool(getattr(getattr(model, "config", None), "share_att_key", False))


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors, both alive, are the same view of the same memory."""
    # `a is b` would miss one tensor that an engine has wrapped in two objects, and PyTorch's fake
    # tensors have no data_ptr().
    if a.untyped_storage() is not b.untyped_storage():
        return False
    return (a.storage_offset(), a.shape, a.stride()) == (b.storage_offset(), b.shape, b.stride())


@contextmanager
def _register_hooks(
    linears: Mapping[str, nn.Linear], hook: Callable[[str, nn.Linear, Tensor], None]
) -> Iterator[None]:
    """Within the context, call `hook(name, module, input)` before each of `linears` runs."""
    handles = []
    for name, module in linears.items():
        # The default binds this iteration's name.
        def call_hook(module: nn.Linear, args: tuple[Tensor, ...], name: str = name) -> None:
            hook(name, module, args[0])

        handles.append(module.register_forward_pre_hook(call_hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def accumulate_moments(
    linears: Mapping[str, nn.Linear], groups: Sequence[Group], moments: Sequence[Moment]
) -> Iterator[Callable[[Tensor], None]]:
    """Within the context, let every forward pass add its tokens to `moments`.

    Args:
        moments: one for each of `groups`.

    Yields:
        A function to call with a batch's `token_mask` before the batch runs: only tokens where it
        is True are added.
    """
    # The modules of a group read the same tensor: a hook on the first is enough.
    firsts: dict[str, tuple[Group, Moment]] = {}
    for group, moment in zip(groups, moments, strict=True):
        firsts[group.modules[0]] = (group, moment)
    flat_mask: Tensor | None = None
    done: set[str] = set()  # modules whose tokens of this pass are added

    def set_token_mask(token_mask: Tensor) -> None:
        nonlocal flat_mask
        flat_mask = token_mask.flatten()
        done.clear()

    def add(name: str, module: nn.Linear, x: Tensor) -> None:
        if name in done:  # see runs_on_relative_positions; find_groups refuses any other module
            return
        done.add(name)
        inputs = x.reshape(-1, x.shape[-1])
        if len(inputs) != flat_mask.numel():
            raise AstraError(
                f"{name} receives {len(inputs)} vectors for {flat_mask.numel()} tokens; "
                "it cannot be calibrated"
            )
        vectors = inputs[flat_mask].double()
        group, moment = firsts[name]
        if group.statistic != "input":
            # y = W x + b. W is whole here: an engine has gathered it before this hook runs.
            vectors = vectors @ module.weight.double().T
            if module.bias is not None:
                vectors += module.bias.double()
        if group.statistic == "scaled output" and len(vectors):
            vectors /= vectors.max().abs()
        moment.add(vectors)

    with _register_hooks({name: linears[name] for name in firsts}, add):
        yield set_token_mask


def is_distributed() -> bool:
    """Tell whether there is a process group; without one this process runs all batches."""
    return dist.is_available() and dist.is_initialized()
