"""A calibration in one window, as several tests want it."""

from collections.abc import Mapping, Sequence

from torch import nn

from astra.calibrate import Find, as_subspace, calibrate, find_subspace
from astra.eigen import Subspace
from astra.moments import Batch, find_groups
from astra.weights import Weights
from astra.windows import Plan, find_layers, make_plan


def finder(select: str, seed: int) -> Find:
    return lambda problem: find_subspace(problem, select, seed)


def plan_of(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    memory: float | None = None,
) -> Plan:
    tokens = max(batch["input_ids"].numel() for batch in batches)
    return make_plan(
        model, linears, find_groups(model, linears, batches[0]), tokens=tokens, memory=memory
    )


def subspaces_of(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    weights: Weights,
    *,
    rank: int,
    select: str,
    seed: int,
) -> dict[str, Subspace]:
    plan = plan_of(model, linears, batches)
    find = finder(select, seed)
    (window,) = calibrate(
        model, linears, [batches], weights, plan, find, ranks=dict.fromkeys(linears, rank)
    )
    return {name: as_subspace(window[name]) for name in linears}


def subspaces_by_layer(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    weights: Weights,
    *,
    rank: int,
    select: str,
    seed: int,
) -> dict[str, Subspace]:
    """The same in windows of one layer, which is the least that fits."""
    whole = plan_of(model, linears, batches)
    layers = len(find_layers(model, linears))
    plan = plan_of(model, linears, batches, whole.windows[0].statistics / layers + whole.working)
    assert len(plan.windows) == layers
    find = finder(select, seed)
    windows = calibrate(
        model, linears, [batches], weights, plan, find, ranks=dict.fromkeys(linears, rank)
    )
    return {name: as_subspace(found) for window in windows for name, found in window.items()}
