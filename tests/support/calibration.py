"""Astra calibrations of small models in one call, for tests whose subject is something else."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

from torch import Tensor, nn

from astra.calibrate import Solution, Solver, calibrate_modules, solve_subspace
from astra.eigen import Subspace
from astra.inits import init_astra
from astra.moments import Batch, find_groups
from astra.weights import Weights
from astra.windows import CalibrationPlan, find_layers, make_plan


def find_projections(model: nn.Module) -> dict[str, nn.Linear]:
    """Return a Llama's seven linear layers of each decoder layer, by name."""
    return {name: m for name, m in model.named_modules() if name.endswith("_proj")}


def make_solver(select: str, seed: int) -> Solver:
    """Return Astra's solver."""
    return lambda problem: solve_subspace(problem, select, seed)


def to_subspace(solution: Solution) -> Subspace:
    """Return the subspace of a solution by Astra's solver."""
    return Subspace(**{field.name: solution[field.name] for field in fields(Subspace)})


def make_factor_source(
    subspaces: Mapping[str, Subspace],
) -> Callable[[str, Tensor], tuple[Tensor, Tensor]]:
    """Return a function (module name, whole W) -> Astra's A0 and B0."""
    return lambda name, weight: init_astra(weight, subspaces[name].vectors, subspaces[name].values)


def plan_calibration(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    memory: float | None = None,
) -> CalibrationPlan:
    """Return the plan for `batches` within `memory` bytes; by default one window."""
    tokens = max(batch["input_ids"].numel() for batch in batches)
    groups = find_groups(model, linears, batches[0])
    return make_plan(model, linears, groups, tokens=tokens, memory=memory)


def find_subspaces(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    weights: Weights,
    plan: CalibrationPlan | None = None,
    *,
    rank: int,
    select: str,
    seed: int,
) -> dict[str, Subspace]:
    """Return every module's subspace from a calibration by `plan`, by default in one window."""
    windows = calibrate_modules(
        model,
        linears,
        [batches],
        weights,
        plan or plan_calibration(model, linears, batches),
        make_solver(select, seed),
        lora_ranks=dict.fromkeys(linears, rank),
        solve_device=batches[0]["input_ids"].device,
    )
    subspaces = {}
    for solutions in windows:
        for name, solution in solutions.items():
            subspaces[name] = to_subspace(solution)
    return subspaces


def find_subspaces_by_layer(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    weights: Weights,
    **options: object,
) -> dict[str, Subspace]:
    """Return the same from a calibration in windows of one layer, the smallest."""
    whole = plan_calibration(model, linears, batches)
    num_layers = len(find_layers(model, linears))
    memory = whole.windows[0].sums_bytes / num_layers + whole.working_bytes
    plan = plan_calibration(model, linears, batches, memory)
    assert len(plan.windows) == num_layers
    return find_subspaces(model, linears, batches, weights, plan, **options)
