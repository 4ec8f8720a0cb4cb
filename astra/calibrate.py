"""Calibrate a model on many ranks: sum statistics of its modules, then solve each module once.

A module is a linear layer `y = W x + b` that gets an adapter. For Astra (arXiv 2602.19111) it needs
r eigenvectors of the second moment of its outputs,

    C = 1/n sum_t y_t y_t^T,        t = 1 ... n, all tokens of all calibration samples.

Words that mean the same throughout this package:

* module: a linear layer that gets an adapter, known by its name in the model. `linears` maps the
  names to the modules.
* rank: a process of the torch.distributed process group. Each runs its own share of the samples. A
  function that is said to be collective must be called by all ranks together.
* r or lora_rank: the rank of an adapter.
* statistic: which kind of sum a module needs: input, output, scaled output, gradient, or weight for
  none (moments.Statistic). The sums themselves are a moments.Moment or a gradients.Gradient.
* moment: a second moment such as C, kept as sums over tokens until it is needed (moments.Moment).
* group: the modules that share one statistic and its sums. q_proj, k_proj and v_proj read the same
  x, and the one moment of x gives the C of each: without a bias, C = W (1/n sum_t x_t x_t^T) W^T.
* window: consecutive decoder layers whose sums are held in memory together
  (windows.CalibrationPlan).
* owner: the rank that solves the modules of a group, from the sums over all ranks.
* solve a module: compute its Solution, for Astra r eigenvectors of its C. How is the caller's
  choice: a `Solver` is a function from a `ModuleProblem` to a `Solution`. Astra's is
  `solve_subspace`; those of other methods use the functions of astra.inits.
* part: the samples that are summed together: all of them, or one of two halves, whose solutions are
  then compared.

Window by window, `calibrate_modules` sums over each rank's tokens, adds up the ranks' sums
(astra.reduction), lets the owners solve their modules, and broadcasts the solutions.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from astra.eigen import EigenSelect, Subspace, solve_eigenproblem
from astra.errors import AstraError, FallbackWarning
from astra.flops import Decomposition, count_solve_flops
from astra.gradients import Gradient, Loss, sum_gradients
from astra.moments import (
    Batch,
    Group,
    Moment,
    Statistic,
    accumulate_moments,
    is_distributed,
    run_forward,
)
from astra.output_moment import find_basis, form_output_moment
from astra.reduction import Reduction, check_sums_agree, reduce_sums
from astra.weights import Weights
from astra.windows import CalibrationPlan, Window, skip_layers_outside

Progress = Callable[[Sequence, str], Iterable]
"""(items, label) -> the same items, while a progress bar named `label` counts them."""

Solution = dict[str, Tensor]
"""The tensors computed for one module, by name, identical on all ranks.

A Solver must return them in fp64: the other ranks receive them as fp64. They are kept on the CPU:
methods that need the weights alone solve all modules in one window.
"""


class ModuleProblem(NamedTuple):
    """What a module's owner knows when it solves the module."""

    name: str
    weight: Tensor  # W, whole: (d_out, d_in), in the model's dtype
    bias: Tensor | None  # b: (d_out,), in the model's dtype
    lora_rank: int  # r
    statistic: Statistic  # the kind of `sums`
    sums: list[Moment | Gradient]  # one a part, over all ranks' tokens; empty for "weight"

    def to(self, device: torch.device) -> "ModuleProblem":
        """Return the problem on `device`."""
        return self._replace(
            weight=self.weight.to(device),
            bias=None if self.bias is None else self.bias.to(device),
            sums=[part_sums.to(device) for part_sums in self.sums],
        )


Solver = Callable[[ModuleProblem], Solution]


def calibrate_modules(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    parts: Sequence[Sequence[Batch]],
    weights: Weights,
    plan: CalibrationPlan,
    solver: Solver,
    *,
    lora_ranks: Mapping[str, int],
    solve_device: torch.device,
    loss: Loss | None = None,
    reduction: Reduction = "all",
    keep: bool = True,
    start: int = 0,
    progress: Progress = lambda items, _: items,
    report_line: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Solution]]:
    """Yield the solutions of one window after another: module name -> Solution.

    Collective: every rank calls it with the same arguments, except `parts`, and must exhaust the
    iterator. Every rank must have the same number of batches, or the ranks of a sharded model
    deadlock; pad with batches whose `token_mask` is all False, which add nothing. The numbers of
    ranks and windows change the order of fp64 additions, and nothing else.

    Args:
        model: a causal language model, called with input_ids, or a sequence classifier.
        linears: name -> module, at least one, in the same order on every rank.
        parts: this rank's batches, on the model's device: one list for all samples, two for halves,
            none for a method that needs the weights only.
        weights: reads whole weights of a model that may be sharded.
        plan: from windows.make_plan.
        solver: called on a module's owner alone.
        lora_ranks: module name -> r.
        solve_device: where modules are solved.
        loss: needed if the plan's statistic is "gradient"; then every batch has labels.
        reduction: whether every rank gets the sums over all ranks, or the owners alone.
        keep: whether this rank gets the solutions; else it yields an empty mapping for each window.
        start: index of the first window, for a caller that has the solutions of the earlier ones.
        progress: called with the batches ("calibrate") and the rounds of solve_window ("solve").
        report_line: called on every rank with a line about a solver that failed, once for each line.

    Raises:
        AstraError: on every rank, if a module cannot be solved on its owner.
    """
    # hidden_states[part][batch]: the hidden state that enters the next window, on the CPU. None
    # means that the window's pass starts at layer 0.
    hidden_states: list[list[Tensor | None]] = [[None] * len(batches) for batches in parts]
    report_once = functools.cache(report_line)  # a line that is in the cache is not reported again
    for window in plan.windows[start:]:
        if window.groups[0].statistic == "gradient":
            sums = [
                sum_gradients(model, linears, batches, window, loss, progress) for batches in parts
            ]
        else:
            sums = []
            for batches, states in zip(parts, hidden_states, strict=True):
                sums.append(
                    sum_second_moments(model, linears, batches, window, plan, states, progress)
                )
        owners = assign_owners(
            window.groups, linears, lora_ranks, plan.decomposition, solve_device.type
        )
        for part_sums in sums:
            # sum over ranks of (sum over a rank's tokens) = sum over all tokens
            reduce_sums(part_sums, owners, reduction)
            if reduction == "all":
                check_sums_agree(part_sums, window.groups)
        yield solve_window(
            window.groups,
            sums,
            owners,
            linears,
            weights,
            solver,
            lora_ranks,
            progress,
            solve_device=solve_device,
            keep=keep,
            report_line=report_once,
        )


@torch.no_grad()
def sum_second_moments(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    window: Window,
    plan: CalibrationPlan,
    hidden_states: list[Tensor | None],
    progress: Progress = lambda items, _: items,
) -> list[Moment]:
    """Return the sums over this rank's `batches`, one Moment for each group of `window`.

    Collective for a sharded model; see calibrate_modules.

    Args:
        hidden_states: the hidden state of each batch that enters the window, or None to run all
            earlier layers too. Each is replaced in place by the one that leaves the window.
    """
    device = batches[0]["input_ids"].device
    moments = [Moment.zeros(group.size, device) for group in window.groups]
    with accumulate_moments(linears, window.groups, moments) as set_token_mask:
        for i, batch in enumerate(progress(batches, "calibrate")):
            set_token_mask(batch["token_mask"])
            entering = hidden_states[i]
            layers = range(window.layers.stop) if entering is None else window.layers
            with skip_layers_outside(plan.layers, layers, entering) as leaving:
                run_forward(model, batch, linears)
            hidden_states[i] = leaving[0] if leaving else None
    return moments


def assign_owners(
    groups: Sequence[Group],
    linears: Mapping[str, nn.Linear],
    lora_ranks: Mapping[str, int],
    decomposition: Decomposition,
    device_type: str,
) -> list[int]:
    """Return the owner of each group, such that all ranks have about the same work.

    Computed alike on every rank, without communication. Groups are assigned in descending order of
    cost, in FLOPs, each to the rank with the least work so far.
    """
    costs = [
        count_solve_flops(group, linears, lora_ranks, decomposition, device_type)
        for group in groups
    ]
    world_size = dist.get_world_size() if is_distributed() else 1
    rank_costs = [0] * world_size
    owners = [0] * len(groups)
    for i in sorted(range(len(groups)), key=lambda i: -costs[i]):
        owners[i] = rank_costs.index(min(rank_costs))
        rank_costs[owners[i]] += costs[i]
    return owners


class _Turn(NamedTuple):
    """One module in the queue of its owner."""

    owner: int
    group: int  # index into the window's groups
    name: str


def solve_window(
    groups: Sequence[Group],
    sums: list[list[Moment | Gradient | None]],
    owners: Sequence[int],
    linears: Mapping[str, nn.Linear],
    weights: Weights,
    solver: Solver,
    lora_ranks: Mapping[str, int],
    progress: Progress = lambda items, _: items,
    *,
    solve_device: torch.device,
    keep: bool = True,
    report_line: Callable[[str], None] = lambda _: None,
) -> dict[str, Solution]:
    """Solve every module of `groups` on its owner, and return all solutions everywhere. Collective.

    Each module is solved once and the solution broadcast, because eigenvectors are not unique: from
    machine to machine they differ in sign and, where eigenvalues are equal, in the choice of a
    basis. In each round every rank solves at most one module, so a rank holds one whole weight and
    one eigenproblem at a time.

    Args:
        sums: sums[part][group]. On the group's owner totals over all ranks; those of other ranks
            are dropped at once. Entries are set to None when no longer needed, to free memory.
        solve_device, keep, report_line: see calibrate_modules.

    Raises:
        AstraError: on every rank, if a module cannot be solved on its owner.
    """
    rank = dist.get_rank() if is_distributed() else 0
    queues: dict[int, list[_Turn]] = {}
    for i, (group, owner) in enumerate(zip(groups, owners, strict=True)):
        queue = queues.setdefault(owner, [])
        queue.extend(_Turn(owner, i, name) for name in group.modules)
        if owner != rank:
            _free_sums(sums, i)
    solutions: dict[str, Solution] = {}
    num_rounds = max(len(queue) for queue in queues.values())
    for number in progress(range(num_rounds), "solve"):
        # This round's module of every rank that still has one, in rank order: the same list
        # everywhere.
        turns = []
        for owner in sorted(queues):
            if number < len(queues[owner]):
                turns.append(queues[owner][number])
        problem, device = _read_problem(turns, rank, groups, sums, linears, weights, lora_ranks)
        solution, outcome = {}, _Outcome({}, None, [])
        if problem is not None:
            problem = problem.to(solve_device)
            solution, outcome = _try_to_solve(solver, problem)
            i = queues[rank][number].group
            if problem.name == groups[i].modules[-1]:
                _free_sums(sums, i)
            del problem
        # The other ranks need the shapes, to allocate the tensors that they receive.
        outcomes = _gather_outcomes(outcome)
        for other in outcomes:
            for line in other.fallbacks:
                report_line(line)
        for turn in turns:
            mine = solution if turn.owner == rank else None
            shapes = outcomes[turn.owner].shapes
            received = _broadcast_solution(mine, turn.owner, shapes, device)
            if keep:
                solutions[turn.name] = received
    return solutions


def _read_problem(
    turns: Sequence[_Turn],
    rank: int,
    groups: Sequence[Group],
    sums: list[list[Moment | Gradient | None]],
    linears: Mapping[str, nn.Linear],
    weights: Weights,
    lora_ranks: Mapping[str, int],
) -> tuple[ModuleProblem | None, torch.device]:
    """Return this rank's problem among `turns`, None if it has none, and the device. Collective.

    Every rank reads every weight, since reading a sharded weight is collective.
    """
    problem = None
    for turn in turns:
        weight = weights.read(linears[turn.name].weight)
        bias = linears[turn.name].bias
        bias = None if bias is None else weights.read(bias)
        if turn.owner == rank:
            problem = ModuleProblem(
                turn.name,
                weight,
                bias,
                lora_ranks[turn.name],
                groups[turn.group].statistic,
                [part_sums[turn.group] for part_sums in sums],
            )
        device = weight.device
        del weight, bias  # before the next read takes as much memory again
    return problem, device


def _free_sums(sums: list[list[Moment | Gradient | None]], group: int) -> None:
    """Drop the sums of the group with index `group`, in every part."""
    for part_sums in sums:
        part_sums[group] = None


class _Outcome(NamedTuple):
    """What the other ranks need to know of a rank's round."""

    shapes: dict[str, torch.Size]  # of its solution; empty if it has none
    error: AstraError | None
    fallbacks: list[str]  # what is to be said of solvers that failed


def _try_to_solve(solver: Solver, problem: ModuleProblem) -> tuple[Solution, _Outcome]:
    """Return the solution and its outcome; an empty one, and an error that names the module."""
    solution, failure = {}, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FallbackWarning)
        try:
            solution = solver(problem)
        except (AstraError, torch.linalg.LinAlgError) as error:
            text = str(error) if problem.name in str(error) else f"{problem.name}: {error}"
            # A LinAlgError has no `subject`, the setting at fault that errors.AstraError names.
            failure = AstraError(text, getattr(error, "subject", None))
    fallbacks = []
    for warning in caught:
        if issubclass(warning.category, FallbackWarning):
            fallbacks.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    # Collectives send contiguous tensors only.
    solution = {key: value.contiguous() for key, value in solution.items()}
    shapes = {key: value.shape for key, value in solution.items()}
    return solution, _Outcome(shapes, failure, fallbacks)


def _gather_outcomes(outcome: _Outcome) -> list[_Outcome]:
    """Return the outcome of every rank, by rank. Collective.

    Raises:
        AstraError: the error of the first rank that has one, on all ranks: else they would wait for
            that rank's broadcast forever.
    """
    outcomes = [outcome]
    if is_distributed():
        outcomes = [outcome] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome)
    for other in outcomes:
        if other.error is not None:
            raise other.error
    return outcomes


def _broadcast_solution(
    solution: Solution | None,
    owner: int,
    shapes: Mapping[str, torch.Size],
    device: torch.device,
) -> Solution:
    """Return the solution of rank `owner` on every rank, on the CPU. Collective.

    Args:
        solution: on the owner; None on the other ranks.
        shapes: of the owner's solution.
        device: on which it is sent.
    """
    if solution is None:
        solution = {}
        for key, shape in shapes.items():
            solution[key] = torch.empty(shape, dtype=torch.float64, device=device)
    received = {}
    for key, value in solution.items():
        tensor = value.to(device)
        if is_distributed():
            dist.broadcast(tensor, owner)
        received[key] = tensor.cpu()
    return received


def solve_subspace(problem: ModuleProblem, select: EigenSelect, seed: int) -> Solution:
    """Return r chosen eigenvectors of a module's output second moment C: Astra's Solver.

    Args:
        select: which eigenvectors; see eigen.select_indices.
        seed: see eigen.solve_eigenproblem.

    Returns:
        The fields of eigen.Subspace, from all samples, and `angles`: the principal angles between
        the subspaces of the two halves of the samples, (r,), radians, ascending; (0,) if the
        samples are one part.
    """
    name, weight, bias, lora_rank, statistic, sums = problem
    weight_basis = find_basis(weight, bias) if statistic == "input" else None

    def find_subspace(moment: Moment) -> Subspace:
        basis, core = form_output_moment(statistic, moment, weight, bias, weight_basis)
        return solve_eigenproblem(basis, core, lora_rank, select, seed, name)

    # sum over all tokens = sum over one half + sum over the other
    subspace = find_subspace(sums[0] if len(sums) == 1 else sums[0] + sums[1])
    if len(sums) == 1:
        angles = subspace.values.new_empty(0)
    elif (
        weight_basis is not None and select == "smallest" and lora_rank <= weight_basis.codimension
    ):
        # All r vectors are orthogonal to the columns of [W b], which no token changes.
        angles = torch.zeros_like(subspace.values)
    else:
        first, second = (find_subspace(half).vectors for half in sums)
        angles = compute_principal_angles(first, second)
    return vars(subspace) | {"angles": angles}


def compute_principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Return the principal angles between the spans of `a` and `b`: (r,), radians, ascending.

    Small angles come from sines, since near 0 a cosine determines an angle to half the digits only
    (Bjorck and Golub, 1973).

    Args:
        a, b: (d, r), fp64, orthonormal columns.
    """
    # svdvals is in descending order, so the cosines' angles ascend and the sines must be flipped.
    # Rounding can lift either above 1, where arccos and arcsin are nan.
    cosines = torch.linalg.svdvals(a.T @ b).clamp(max=1)
    sines = torch.linalg.svdvals(b - a @ (a.T @ b)).clamp(max=1).flip(0)
    return torch.where(cosines**2 > 0.5, sines.arcsin(), cosines.arccos())
