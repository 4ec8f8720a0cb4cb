"""Distributed calibration: every rank runs its batches, moments are reduced, each eigenproblem is solved once."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from astra.cost import solve_flops
from astra.eigen import EigenSelect, Subspace, solve
from astra.errors import AstraError
from astra.factor import left_basis, output_moment
from astra.moments import Batch, Group, Moment, accumulating, distributed, forward, reduce
from astra.weights import Weights
from astra.windows import Plan, Window, only

Progress = Callable[[Sequence, str], Iterable]


@dataclass(frozen=True)
class Found:
    """What a calibration found for one module, identical on all ranks."""

    subspace: Subspace
    angles: Tensor  # (r,) radians, ascending: principal angles between the parts' subspaces; empty for a single part


def calibrate(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    parts: Sequence[Sequence[Batch]],
    weights: Weights,
    plan: Plan,
    *,
    ranks: Mapping[str, int],
    select: EigenSelect,
    seed: int,
    start: int = 0,
    progress: Progress = lambda items, _: items,
) -> Iterator[dict[str, Found]]:
    """The chosen r output eigenvectors of every module, window after window of the plan from window `start` on.

    Collective. Every rank passes the same number of batches (sharded models hang otherwise); pad with batches whose
    `counted` is False throughout. Neither world size nor windows change more than the order of fp64 sums.

    Args:
        model: a causal LM, called with input_ids.
        linears: name -> module, at least one; in the same order on every rank.
        parts: this rank's share of the calibration batches, on the model's device: of all samples, or of each of two
            halves, which are then also solved apart (`Found.angles`).
        weights: access to whole weights.
        plan: see windows.make_plan; alike on every rank.
        ranks: r, the number of eigenvectors, of every module. select, seed: see eigen.solve.
        progress: wraps what is gone through, named "calibrate" (batches) or "solve" (rounds of eigenproblems).
    """
    states: list[list[Tensor | None]] = [[None] * len(batches) for batches in parts]
    for window in plan.windows[start:]:
        moments = [
            second_moments(model, linears, batches, window, plan, states[i], progress)
            for i, batches in enumerate(parts)
        ]
        owners = share_out(window.groups, linears, ranks)
        for of_part in moments:
            reduce(of_part, owners)
        yield solve_window(
            window.groups, moments, owners, linears, weights, ranks=ranks, select=select, seed=seed, progress=progress
        )


@torch.no_grad()
def second_moments(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    window: Window,
    plan: Plan,
    states: list[Tensor | None],
    progress: Progress = lambda items, _: items,
) -> list[Moment]:
    """This rank's sums over `batches` for each of the window's groups. Collective; see `calibrate`.

    Args:
        states: of each batch the hidden state before the window, None to run all layers before it too; replaced by
            the states after it.
    """
    moments = [Moment.zeros(group.size, batches[0]["input_ids"].device) for group in window.groups]
    with accumulating(linears, window.groups, moments) as count:
        for i, batch in enumerate(progress(batches, "calibrate")):
            count(batch["counted"])
            layers = window.layers if states[i] is not None else range(window.layers.stop)
            with only(plan.layers, layers, states[i]) as after:
                forward(model, batch)
            states[i] = after[0] if after else None
    return moments


def share_out(groups: Sequence[Group], linears: Mapping[str, nn.Linear], ranks: Mapping[str, int]) -> list[int]:
    """The process that solves each group: the costliest first, each to that with least to do so far."""
    costs = [solve_flops(group, linears, ranks) for group in groups]
    load = [0] * (dist.get_world_size() if distributed() else 1)
    owners = [0] * len(groups)
    for i in sorted(range(len(groups)), key=lambda i: -costs[i]):
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    return owners


def solve_window(
    groups: Sequence[Group],
    moments: list[list[Moment]],
    owners: Sequence[int],
    linears: Mapping[str, nn.Linear],
    weights: Weights,
    *,
    ranks: Mapping[str, int],
    select: EigenSelect,
    seed: int,
    progress: Progress = lambda items, _: items,
) -> dict[str, Found]:
    """Solve every module of `groups` once, on its group's owner rank, and broadcast the result. Collective.

    Eigenvectors differ in sign, and in degenerate spaces altogether, from machine to machine: hence one owner. The
    modules are taken in rounds of one a rank, so that a rank holds one problem at a time.

    Args:
        moments: by part and group, whole on the owner; emptied as they are done with.
    """
    this_rank = dist.get_rank() if distributed() else 0
    queues: dict[int, list[tuple[int, str]]] = {}
    for i, (group, owner) in enumerate(zip(groups, owners, strict=True)):
        queues.setdefault(owner, []).extend((i, name) for name in group.modules)
        if owner != this_rank:
            for of_part in moments:
                of_part[i] = None
    found: dict[str, Found] = {}
    for number in progress(range(max(map(len, queues.values()))), "solve"):
        here = [(owner, *queue[number]) for owner, queue in sorted(queues.items()) if number < len(queue)]
        mine = None
        for owner, i, name in here:
            weight = weights.read(linears[name].weight)
            bias = None if linears[name].bias is None else weights.read(linears[name].bias)
            if owner == this_rank:
                mine = i, name, weight, bias
            device = weight.device
            del weight, bias
        solved, error = None, None
        if mine is not None:
            i, name, weight, bias = mine
            try:
                parts = [of_part[i] for of_part in moments]
                solved = _solve_module(
                    groups[i].of, parts, weight, bias, rank=ranks[name], select=select, seed=seed, name=name
                )
            except (AstraError, torch.linalg.LinAlgError) as exc:
                error = str(exc) if name in str(exc) else f"{name}: {exc}"
            if name == groups[i].modules[-1]:
                for of_part in moments:
                    of_part[i] = None
        _raise_on_all_ranks(error)
        for owner, _, name in here:
            like = torch.empty(0, dtype=torch.float64, device=device)
            shapes = _shapes(linears[name].out_features, ranks[name], len(moments))
            found[name] = _share(solved if owner == this_rank else None, owner, shapes, like)
    return found


def _solve_module(
    of: str,
    parts: list[Moment],
    weight: Tensor,
    bias: Tensor | None,
    *,
    rank: int,
    select: EigenSelect,
    seed: int,
    name: str,
) -> Found:
    basis = left_basis(weight, bias) if of == "input" else None
    whole = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    subspace = solve(*output_moment(of, whole, weight, bias, basis), rank, select, seed, name)
    del whole
    if len(parts) == 1:
        return Found(subspace, subspace.values.new_empty(0))
    if basis is not None and select == "smallest" and rank <= basis.codimension:
        return Found(subspace, torch.zeros_like(subspace.values))  # vectors that W alone decides
    halves = [solve(*output_moment(of, part, weight, bias, basis), rank, select, seed, name) for part in parts]
    return Found(subspace, principal_angles(*(half.vectors for half in halves)))


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Between the spans of two matrices of r orthonormal columns, (r,), radians, ascending.

    From sines where they are small, since cosines lose half of the digits there (Bjorck and Golub, 1973).
    """
    cosines = torch.linalg.svdvals(a.T @ b).clamp(max=1)  # descending
    sines = torch.linalg.svdvals(b - a @ (a.T @ b)).clamp(max=1).flip(0)  # ascending
    return torch.where(cosines**2 > 0.5, sines.arcsin(), cosines.arccos())


def _raise_on_all_ranks(error: str | None) -> None:
    """One rank's failure is every rank's, so that none is left waiting in a broadcast."""
    errors = [error]
    if distributed():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    for message in errors:
        if message is not None:
            raise AstraError(message)


def _shapes(size: int, rank: int, parts: int) -> list[tuple[int, ...]]:
    return [(size, rank), (rank,), (size,), (3,), (rank if parts > 1 else 0,)]


def _share(solved: Found | None, owner: int, shapes: list[tuple[int, ...]], like: Tensor) -> Found:
    """`solved` of the owner rank, on every rank; `like` gives dtype and device."""
    if not distributed():
        return solved
    if solved is None:
        tensors = [like.new_empty(shape) for shape in shapes]
    else:
        of = solved.subspace
        tensors = [t.contiguous() for t in (of.vectors, of.values, of.spectrum, of.checks, solved.angles)]
    for tensor in tensors:
        dist.broadcast(tensor, owner)
    return Found(Subspace(*tensors[:4]), tensors[4])
