"""Distributed calibration: every rank runs its batches, moments are all-reduced, each eigenproblem is solved once."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from astra.eigen import EigenSelect, Subspace, solve
from astra.errors import AstraError
from astra.moments import Batch, Statistic, accumulate, all_reduce, distributed, factor, find_groups, plan
from astra.weights import Weights

Progress = Callable[[Sequence, str], Iterable]


def calibrate(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    weights: Weights,
    *,
    rank: int,
    select: EigenSelect,
    seed: int,
    progress: Progress = lambda items, _: items,
) -> dict[str, Subspace]:
    """The chosen r output eigenvectors of every module, identical on all ranks.

    Collective. Every rank passes the same number of batches (sharded models hang otherwise); pad with batches whose
    `counted` is False throughout. World size changes only the order of fp64 sums.

    Args:
        model: a causal LM, called with input_ids.
        linears: name -> module, at least one; in the same order on every rank.
        batches: this rank's share of the calibration batches, on the model's device.
        weights: access to whole weights.
        rank: r, the number of eigenvectors. select, seed: see eigen.solve.
        progress: wraps what is gone through, named "calibrate" (batches) or "solve" (rounds of eigenproblems).
    """
    statistics = second_moments(model, linears, batches, progress)
    return solve_all(statistics, linears, weights, rank=rank, select=select, seed=seed, progress=progress)


def second_moments(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    progress: Progress = lambda items, _: items,
) -> list[Statistic]:
    """The statistics of all ranks' batches, summed; see `calibrate` for the arguments. Collective."""
    groups = find_groups(model, linears, batches[0])
    statistics = plan(groups, linears, batches[0]["input_ids"].device)
    accumulate(model, linears, statistics, progress(batches, "calibrate"))
    all_reduce(statistics)
    return statistics


def solve_all(
    statistics: list[Statistic],
    linears: Mapping[str, nn.Linear],
    weights: Weights,
    *,
    rank: int,
    select: EigenSelect,
    seed: int,
    progress: Progress = lambda items, _: items,
) -> dict[str, Subspace]:
    """Solve every module's eigenproblem once, on its owner rank, and broadcast the result.

    Eigenvectors differ in sign, and in degenerate spaces altogether, from machine to machine: hence one owner.
    The modules are taken in rounds of one a rank, in descending order of cost, so that the owners of a round have
    like work and a rank holds one problem at a time.
    """
    statistic_of = {name: statistic for statistic in statistics for name in statistic.modules}

    def cost(name: str) -> tuple[int, int]:
        """The eigenproblem's size, then the size of the product that forms it."""
        linear = linears[name]
        return min(linear.in_features, linear.out_features), linear.out_features

    by_cost = sorted(linears, key=cost, reverse=True)
    world_size, this_rank = (dist.get_world_size(), dist.get_rank()) if distributed() else (1, 0)
    subspaces: dict[str, Subspace] = {}
    for start in progress(range(0, len(by_cost), world_size), "solve"):
        names = by_cost[start : start + world_size]
        mine = None
        for owner, name in enumerate(names):
            weight = weights.read(linears[name].weight)
            bias = None if linears[name].bias is None else weights.read(linears[name].bias)
            if owner == this_rank:
                mine = factor(statistic_of[name], weight, bias)
        solved, error = None, None
        if mine is not None:
            try:
                solved = solve(*mine, rank, select, seed, names[this_rank])
            except AstraError as exc:
                error = str(exc)
            except torch.linalg.LinAlgError as exc:
                error = f"{names[this_rank]}: {exc}"
        _raise_on_all_ranks(error)
        for owner, name in enumerate(names):
            like = statistic_of[name].moment.outer
            subspaces[name] = _share(solved if owner == this_rank else None, owner, linears[name], rank, like)
    return {name: subspaces[name] for name in linears}


def _raise_on_all_ranks(error: str | None) -> None:
    """One rank's failure is every rank's, so that none is left waiting in a broadcast."""
    errors = [error]
    if distributed():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    for message in errors:
        if message is not None:
            raise AstraError(message)


def _share(solved: Subspace | None, owner: int, linear: nn.Linear, rank: int, like: Tensor) -> Subspace:
    """`solved` of the owner rank, on every rank; `like` gives dtype and device."""
    if solved is None:
        solved = Subspace(like.new_empty(linear.out_features, rank), like.new_empty(rank))
    if distributed():
        solved = Subspace(solved.vectors.contiguous(), solved.values.contiguous())
        dist.broadcast(solved.vectors, owner)
        dist.broadcast(solved.values, owner)
    return solved
