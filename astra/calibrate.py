"""Distributed calibration: every rank runs its batches, statistics are reduced, each module is solved once.

What a method finds of a module is a few named tensors. It is a pure function of a Problem, and the rest is alike for
all methods. Astra's is here; others' take what is in inits.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from astra.eigen import EigenSelect, Subspace, solve
from astra.errors import AstraError
from astra.flops import Decomposed, solve_flops
from astra.gradients import Gradient, Loss, gradients
from astra.moments import (
    Batch,
    Group,
    Moment,
    Statistic,
    accumulating,
    distributed,
    forward,
    reduce,
)
from astra.output_moment import left_basis, output_moment
from astra.weights import Weights
from astra.windows import Plan, Window, only

Progress = Callable[[Sequence, str], Iterable]
Sums = Moment | Gradient
Found = dict[str, Tensor]
"""What was found of one module, by name, identical on all ranks."""


class Problem(NamedTuple):
    """One module, as its owner rank has it."""

    name: str
    weight: Tensor  # whole, in the model's dtype
    bias: Tensor | None
    rank: int
    of: Statistic
    parts: list[
        Sums
    ]  # of all samples, or of each of two halves; none where the weight alone decides


Find = Callable[[Problem], Found]


def calibrate(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    parts: Sequence[Sequence[Batch]],
    weights: Weights,
    plan: Plan,
    find: Find,
    *,
    ranks: Mapping[str, int],
    loss: Loss | None = None,
    start: int = 0,
    progress: Progress = lambda items, _: items,
) -> Iterator[dict[str, Found]]:
    """What `find` finds of every module, window after window of the plan from window `start` on.

    Collective. Every rank passes the same number of batches (sharded models hang otherwise); pad with batches whose
    `counted` is False throughout. Neither world size nor windows change more than the order of fp64 sums.

    Args:
        model: a causal LM, called with input_ids.
        linears: name -> module, at least one; in the same order on every rank.
        parts: this rank's share of the calibration batches, on the model's device: of all samples, or of each of two
            halves, which are then also solved apart; empty for a method that looks at weights alone.
        weights: access to whole weights.
        plan: see windows.make_plan; alike on every rank.
        find: called on a module's owner rank alone, so its result need not be the same on other machines.
        ranks: r of every module.
        loss: for gradients; then every batch has `labels`.
        progress: wraps what is gone through, named "calibrate" (batches) or "solve" (rounds of modules).
    """
    states: list[list[Tensor | None]] = [[None] * len(batches) for batches in parts]
    for window in plan.windows[start:]:
        if window.groups[0].of == "gradient":
            sums = [gradients(model, linears, batches, window, loss, progress) for batches in parts]
        else:
            sums = [
                second_moments(model, linears, batches, window, plan, of_part, progress)
                for batches, of_part in zip(parts, states, strict=True)
            ]
        owners = share_out(window.groups, linears, ranks, plan.decomposed)
        for of_part in sums:
            reduce(of_part, owners)
        yield solve_window(
            window.groups, sums, owners, linears, weights, find, ranks=ranks, progress=progress
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


def share_out(
    groups: Sequence[Group],
    linears: Mapping[str, nn.Linear],
    ranks: Mapping[str, int],
    decomposed: Decomposed = "output",
) -> list[int]:
    """The process that solves each group: the costliest first, each to that with least to do so far."""
    costs = [solve_flops(group, linears, ranks, decomposed) for group in groups]
    load = [0] * (dist.get_world_size() if distributed() else 1)
    owners = [0] * len(groups)
    for i in sorted(range(len(groups)), key=lambda i: -costs[i]):
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    return owners


def solve_window(
    groups: Sequence[Group],
    sums: list[list[Sums]],
    owners: Sequence[int],
    linears: Mapping[str, nn.Linear],
    weights: Weights,
    find: Find,
    *,
    ranks: Mapping[str, int],
    progress: Progress = lambda items, _: items,
) -> dict[str, Found]:
    """Solve every module of `groups` once, on its group's owner rank, and broadcast the result. Collective.

    Eigenvectors differ in sign, and in degenerate spaces altogether, from machine to machine: hence one owner. The
    modules are taken in rounds of one a rank, so that a rank holds one problem at a time.

    Args:
        sums: by part and group, whole on the owner; emptied as they are done with.
    """
    this_rank = dist.get_rank() if distributed() else 0
    queues: dict[int, list[tuple[int, str]]] = {}
    for i, (group, owner) in enumerate(zip(groups, owners, strict=True)):
        queues.setdefault(owner, []).extend((i, name) for name in group.modules)
        if owner != this_rank:
            for of_part in sums:
                of_part[i] = None
    found: dict[str, Found] = {}
    for number in progress(range(max(map(len, queues.values()))), "solve"):
        here = [
            (owner, *queue[number])
            for owner, queue in sorted(queues.items())
            if number < len(queue)
        ]
        problem = None
        for owner, i, name in here:
            weight = weights.read(linears[name].weight)
            bias = None if linears[name].bias is None else weights.read(linears[name].bias)
            if owner == this_rank:
                parts = [of_part[i] for of_part in sums]
                problem = Problem(name, weight, bias, ranks[name], groups[i].of, parts)
            device = weight.device
            del weight, bias
        solved, error = {}, None
        if problem is not None:
            try:
                solved = {key: value.contiguous() for key, value in find(problem).items()}
            except (AstraError, torch.linalg.LinAlgError) as exc:
                error = str(exc) if problem.name in str(exc) else f"{problem.name}: {exc}"
            i = queues[this_rank][number][0]
            if problem.name == groups[i].modules[-1]:
                for of_part in sums:
                    of_part[i] = None
            del problem
        shapes = _shapes_of_all_ranks(solved, error)
        for owner, _, name in here:
            found[name] = _share(
                solved if owner == this_rank else None, owner, shapes[owner], device
            )
    return found


def find_subspace(problem: Problem, select: EigenSelect, seed: int) -> Found:
    """Astra's: the chosen eigenvectors of the module's output second moment, checked; see eigen.solve.

    Returns:
        The fields of eigen.Subspace, and `angles`, (r,), radians, ascending: the principal angles between the subspaces
        of the two halves of the samples; empty for a single part.
    """
    name, weight, bias, rank, of, parts = problem
    basis = left_basis(weight, bias) if of == "input" else None

    def subspace_of(moment: Moment) -> Subspace:
        return solve(*output_moment(of, moment, weight, bias, basis), rank, select, seed, name)

    subspace = subspace_of(parts[0] if len(parts) == 1 else parts[0] + parts[1])
    if len(parts) == 1:
        angles = subspace.values.new_empty(0)
    elif basis is not None and select == "smallest" and rank <= basis.codimension:
        angles = torch.zeros_like(subspace.values)  # vectors that W alone decides
    else:
        angles = principal_angles(*(subspace_of(part).vectors for part in parts))
    return vars(subspace) | {"angles": angles}


def as_subspace(found: Found) -> Subspace:
    """The subspace that find_subspace found."""
    return Subspace(**{field.name: found[field.name] for field in fields(Subspace)})


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Between the spans of two matrices of r orthonormal columns, (r,), radians, ascending.

    From sines where they are small, since cosines lose half of the digits there (Bjorck and Golub, 1973).
    """
    cosines = torch.linalg.svdvals(a.T @ b).clamp(max=1)  # descending
    sines = torch.linalg.svdvals(b - a @ (a.T @ b)).clamp(max=1).flip(0)  # ascending
    return torch.where(cosines**2 > 0.5, sines.arcsin(), cosines.arccos())


def _shapes_of_all_ranks(solved: Found, error: str | None) -> list[dict[str, torch.Size]]:
    """What each rank has solved, by shape. One's failure is every rank's, so that none waits in a broadcast."""
    told = [({key: value.shape for key, value in solved.items()}, error)]
    if distributed():
        mine = told[0]
        told = [mine] * dist.get_world_size()
        dist.all_gather_object(told, mine)
    for _, message in told:
        if message is not None:
            raise AstraError(message)
    return [shapes for shapes, _ in told]


def _share(
    solved: Found | None, owner: int, shapes: Mapping[str, torch.Size], device: torch.device
) -> Found:
    """`solved`, fp64, of the owner rank, on every rank."""
    if not distributed():
        return solved
    if solved is None:
        solved = {
            key: torch.empty(shape, dtype=torch.float64, device=device)
            for key, shape in shapes.items()
        }
    for tensor in solved.values():
        dist.broadcast(tensor, owner)
    return solved
