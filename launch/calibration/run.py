"""A recipe's calibration: made window by window, or taken from `calibration.path`."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from astra.calibrate import ModuleProblem, Solution, calibrate_modules
from astra.moments import find_groups
from astra.spectrum import allocate_ranks
from astra.targets import find_targets
from astra.windows import CalibrationPlan, make_plan
from launch.calibration.batches import (
    check_samples,
    choose_prompt,
    count_tokens,
    draw_samples,
    make_calibration_batches,
    print_calibration_rows,
)
from launch.calibration.report import write_report
from launch.calibration.solvers import choose_solve_device, count_own_cores, use_cores
from launch.calibration.store import (
    begin_calibration,
    check_calibration,
    copy_summary,
    finish_calibration,
    is_finished,
    read_solution,
    read_summary,
    save_window,
)
from launch.config.rows import SENTENCES
from launch.config.schema import Recipe
from launch.data.inputs import Inputs
from launch.engines import Engine, make_engine
from launch.methods.base import crop_solution
from launch.models.check import CheckedModel
from launch.run.folder import make_folder
from launch.run.progress import show_progress
from launch.run.provenance import describe_conditions, name_dtype
from launch.runtime import watchdog
from launch.runtime.distributed import print_rank0, run_on_rank0
from launch.runtime.errors import UserError
from launch.runtime.locks import FolderLock
from launch.runtime.memory import free_dropped_models
from launch.runtime.units import GIB
from launch.training.loss import sum_label_loss
from launch.training.row_loss import sum_row_label_loss
from launch.training.trainable import check_and_describe_model, draw_new_weights

TIE_BREAK = (
    "where eigenvalues are zero: fixed Gaussian directions from (seed, module name), projected first "
    "onto what the weight cannot reach, then onto the null space of the moment"
)
MIN_KEPT_RANK = 256  # vectors kept of a module where ranks follow from its spectrum


def open_calibration_folder(recipe: Recipe, folder: Path) -> FolderLock:
    """Make and lock the folder of a calibration that is made alone. Collective.

    Returns:
        The folder's lock, which the caller keeps until the calibration is made.

    Raises:
        UserError: the recipe's method needs no calibration, it names one already, or the folder
            cannot be used.
    """
    if recipe.calibration.path is not None:
        raise UserError("calibration.path: is what --output makes; leave it out here")
    if not recipe.adapter.method_record.is_calibrated:
        raise UserError(f"adapter.method: {recipe.label} needs no calibration")
    lock = FolderLock(folder)

    def open_folder() -> None:
        make_folder(folder)
        lock.acquire()

    run_on_rank0(open_folder)
    return lock


def calibrate_alone(recipe: Recipe, inputs: Inputs, folder: Path, device: torch.device) -> None:
    """Make the calibration of `recipe` in `folder`, for runs to take as calibration.path.

    Collective. A killed process is resumed after its last window; a finished folder is left alone.

    Args:
        folder: opened by `open_calibration_folder`.
    """
    check_samples(recipe, inputs, folder)
    print_calibration_rows(recipe, inputs)
    print_rank0(run_on_rank0(lambda: check_and_describe_model(inputs.model, recipe.adapter)))
    if find_calibration(recipe, inputs, folder) is not None:
        print_rank0(f"{folder} already holds this calibration, finished")
        return
    calibrate_base(recipe, inputs, device, folder)
    print_rank0(f"the calibration is in {folder}: set calibration.path={folder}")


def find_calibration(recipe: Recipe, inputs: Inputs, folder: Path) -> Path | None:
    """Return the folder of the recipe's calibration, checked, if it is finished. Collective.

    That is calibration.path where the recipe sets it, else `folder`.

    Returns:
        None if the calibration is still to be made in `folder`.

    Raises:
        UserError: the calibration there is not this recipe's, or that at calibration.path is not
            finished.
    """
    path = recipe.calibration.path
    source = folder if path is None else Path(path).expanduser()
    if path is None and not run_on_rank0(lambda: is_finished(folder)):
        return None
    described = describe_calibration(recipe, inputs, conditions={})  # they are not compared
    run_on_rank0(lambda: check_calibration(source, described))
    return source


def calibrate_base(recipe: Recipe, inputs: Inputs, device: torch.device, folder: Path) -> None:
    """Load the base, make its calibration in `folder`, and free the base. Collective."""
    watchdog.set_phase("loading the base")
    engine = make_engine(recipe.engine, device, inputs.dtype, recipe.shard_within)
    base, linears = load_base(recipe, inputs.model, engine)
    with engine.inference_mode(base):
        make_calibration(recipe, inputs, engine, base, linears, folder)
    del engine, base, linears
    free_dropped_models()


def load_base(
    recipe: Recipe, checked: CheckedModel, engine: Engine
) -> tuple[PreTrainedModel, dict[str, nn.Linear]]:
    """Load a model to be calibrated, with all its values, and find its targets. Collective."""
    base = engine.load_model(checked)
    watchdog.beat_on_forward(base)
    linears = find_targets(base, recipe.adapter.targets, recipe.adapter.exclude)
    engine.materialize(base)
    draw_new_weights(base, checked, recipe.train.seed, engine)
    return base, linears


def obtain_calibration(
    recipe: Recipe,
    inputs: Inputs,
    engine: Engine,
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    folder: Path,
) -> Path | None:
    """Return the folder of the recipe's calibration, which is made in `folder` if needed.

    Collective. With calibration.path that folder is checked and taken instead.

    Returns:
        None for a method that needs no calibration.

    Raises:
        UserError: see `find_calibration`.
    """
    if not recipe.adapter.method_record.is_calibrated:
        return None
    source = find_calibration(recipe, inputs, folder)
    if source is None:
        make_calibration(recipe, inputs, engine, model, linears, folder)
        return folder
    if source != folder:
        run_on_rank0(lambda: copy_summary(source, folder))
        print_rank0(f"calibration: taken from {source}")
    return source


def make_calibration(
    recipe: Recipe,
    inputs: Inputs,
    engine: Engine,
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    folder: Path,
) -> None:
    """Calibrate `model`, in its engine's inference mode, into `folder`. Collective.

    calibration.memory_gib is no longer `auto` (launch.planning.budget). Begins with the first
    window that has no file. The plan is printed before it runs; the checks of the solutions, and
    warnings, afterwards.
    """
    watchdog.set_phase("calibration", timed=True)
    started = time.perf_counter()
    samples = draw_samples(recipe, inputs)
    lengths = count_tokens(recipe, inputs, samples)
    parts = make_calibration_batches(recipe, inputs, samples, engine.device)
    plan = _plan_calibration(recipe, model, linears, parts, lengths)
    print_rank0(plan.describe())
    # Not compared with those of another start: they change the order of fp64 additions at most.
    conditions = describe_conditions(dist.get_world_size(), engine.device)
    conditions["memory_gib"] = recipe.calibration.memory_gib
    conditions["reduction"] = recipe.calibration.reduction
    described = describe_calibration(recipe, inputs, conditions)
    described["windows"] = [list(window.groups) for window in plan.windows]
    lora_ranks = _choose_kept_ranks(recipe, linears)
    groups = [group for window in plan.windows for group in window.groups]
    solve_device, line = choose_solve_device(
        engine.device, groups, linears, lora_ranks, plan.decomposition
    )
    if line is not None:
        print_rank0(line)
    begun = run_on_rank0(lambda: begin_calibration(folder, described))
    started -= begun.seconds
    if begun.num_windows:
        print_rank0(
            f"resuming after window {begun.num_windows} of {len(plan.windows)}, from {folder}"
        )
    windows = calibrate_modules(
        model,
        linears,
        parts,
        engine,
        plan,
        _make_solver(recipe, engine.device),
        loss=sum_row_label_loss if recipe.task.has_head else sum_label_loss,
        lora_ranks=lora_ranks,
        reduction=recipe.calibration.reduction,
        solve_device=solve_device,
        start=begun.num_windows,
        keep=dist.get_rank() == 0,  # which writes them
        progress=_show_calibration_progress,
        report_line=print_rank0,
    )
    _save_windows(folder, windows, begun.num_windows, started)
    facts = {"tokens": int(lengths.sum()), "seconds": time.perf_counter() - started}
    print_rank0(
        f"calibration: {len(linears)} modules, {facts['tokens']} tokens, {facts['seconds']:.1f} s"
    )
    if recipe.adapter.method_record.solution == "subspace":
        reachable = {name: _count_reachable_outputs(linear) for name, linear in linears.items()}
        for line in run_on_rank0(lambda: write_report(folder, recipe, reachable, facts["tokens"])):
            print_rank0(line)
    run_on_rank0(lambda: finish_calibration(folder, facts))


def _save_windows(
    folder: Path, windows: Iterator[dict[str, Solution]], start: int, started: float
) -> None:
    """Write one window after another as they are solved. Collective.

    Args:
        start: number of the first.
        started: when the calibration did, by time.perf_counter, had it never been interrupted.
    """
    for number, solutions in enumerate(windows, start=start):
        seconds = time.perf_counter() - started
        save = functools.partial(save_window, folder, number, solutions, seconds)
        with watchdog.without_stall_limit():
            run_on_rank0(save)


def _plan_calibration(
    recipe: Recipe,
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    parts: list[list],
    lengths: Tensor,
) -> CalibrationPlan:
    """Plan the windows that keep the statistics within calibration.memory_gib.

    Args:
        parts: this rank's batches in one list; in two with split_half; none if only weights count.
        lengths: (samples,), tokens of each.
    """
    settings = recipe.calibration
    first_batch = parts[0][0] if parts else None
    memory = None if settings.memory_gib is None else settings.memory_gib * GIB
    return make_plan(
        model,
        linears,
        find_groups(model, linears, first_batch, recipe.statistic),
        tokens=int(lengths.max()) * settings.batch_size if len(lengths) else 0,
        num_parts=len(parts),
        memory=memory,
        decomposition=recipe.adapter.method_record.decomposition,
    )


def _make_solver(recipe: Recipe, device: torch.device) -> Callable[[ModuleProblem], Solution]:
    """Return the function that solves one module of the recipe's method. Collective.

    Args:
        device: of the model. Beside GPUs, CPUs have all of a rank's cores to solve with.
    """
    solve, settings = recipe.adapter.method_record.solve, recipe.method_settings()
    num_cores = count_own_cores() if device.type == "cuda" else None

    def solve_module(problem: ModuleProblem) -> Solution:
        # A module of tens of thousands of rows takes minutes on few cores, without a heartbeat.
        with (
            watchdog.without_stall_limit(),
            nullcontext() if num_cores is None else use_cores(num_cores),
        ):
            return solve(problem, settings)

    return solve_module


def _show_calibration_progress(items: list, name: str) -> object:
    unit = {"calibrate": "batches", "solve": "rounds"}[name]
    return show_progress(items, len(items), name, dist.get_rank(), unit)


def _count_reachable_outputs(linear: nn.Linear) -> int:
    """Return how many dimensions of its outputs a module's weight and bias can reach at all."""
    has_bias = linear.bias is not None
    return min(linear.out_features, linear.in_features + has_bias)


def choose_kept_rank(recipe: Recipe) -> int:
    """Return how many vectors a calibration keeps of each module; a smaller module keeps all."""
    rank = recipe.adapter.rank
    if recipe.adapter.rank_allocation == "effective_rank":
        return max(2 * rank, MIN_KEPT_RANK)
    return rank


def _choose_kept_ranks(recipe: Recipe, linears: Mapping[str, nn.Linear]) -> dict[str, int]:
    """Return how many vectors are kept of each module. Raises UserError for a rank too large."""
    rank, kept = recipe.adapter.rank, choose_kept_rank(recipe)
    per_rank = recipe.adapter.method_record.vectors_per_rank
    ranks = {}
    for name, linear in linears.items():
        smaller = min(linear.in_features, linear.out_features)
        if per_rank * rank > smaller:
            needed = f"{rank}" if per_rank == 1 else f"{per_rank} x {rank}"
            raise UserError(
                f"adapter.rank: {recipe.adapter.method} needs {needed} vectors, and {name} has a "
                f"smaller side of {smaller}; lower it"
            )
        ranks[name] = min(kept, smaller)
    return ranks


def allocate_lora_ranks(recipe: Recipe, folder: Path) -> dict[str, int]:
    """Return each module's rank by its effective rank in the calibration in `folder`. Collective.

    A calibration for a larger rank gives the same: it keeps more vectors than count here.
    """
    modules = run_on_rank0(lambda: read_summary(folder)["modules"])
    effective = {name: module["effective_rank"] for name, module in modules.items()}
    most = choose_kept_rank(recipe)
    kept = {name: min(module["rank"], most) for name, module in modules.items()}
    return allocate_ranks(effective, kept, recipe.adapter.rank)


def make_factor_source(
    recipe: Recipe, source: Path | None, lora_ranks: Mapping[str, int], device: torch.device
) -> Callable[[str, Tensor], tuple[Tensor, Tensor]]:
    """Return a function (module name, whole W) -> (A0, B0), fp64: the method's initial factors.

    Its calls are collective, in the same order on every rank.

    Args:
        source: folder of the calibration; None for a method that needs none.
        lora_ranks: of every module.
    """
    method, settings = recipe.adapter.method_record, recipe.method_settings()

    def make_factors(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        rank, solution = lora_ranks[name], None
        if source is not None:

            def crop(whole: Solution) -> Solution:
                return crop_solution(whole, method, rank, settings)

            solution = read_solution(source, name, device, crop)
        return method.make_factors(name, weight, rank, settings, solution)

    return make_factors


def _describe_head(recipe: Recipe) -> dict:
    """Describe what of a new head decides a calibration; nothing of a causal task."""
    if not recipe.task.has_head:
        return {}
    # Gradients pass through the head, which is drawn from this seed and has these outputs.
    if recipe.statistic == "gradient":
        head = {"head_seed": recipe.train.seed, "labels": recipe.task.labels}
    else:
        head = {"head_seed": None}
    return {"task": recipe.task.kind, **head}


def describe_calibration(recipe: Recipe, inputs: Inputs, conditions: dict) -> dict:
    """Describe how the calibration is made, as the manifest has it.

    store.COMPARED_FIELDS names what a run that reuses it must share. A value is None where the
    method does not depend on it.
    """
    settings, adapter = recipe.calibration, recipe.adapter
    method = adapter.method_record
    of_data = {
        "data": inputs.calibration.data,
        "prompt": choose_prompt(recipe),
        "max_length": recipe.data.max_length,
        "sample_ids": draw_samples(recipe, inputs),
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        # The kind of split, which must be the same to resume; True was one by the file's order.
        "split_half": "interleaved" if settings.split_half else False,
    }
    of_subspace = {
        "eigen_select": adapter.eigen_select,
        "statistics": settings.statistics,
        "tie_break": TIE_BREAK,
    }
    # Manifests of earlier versions have no such key: it is there only for calibration.data, and its
    # sentence fields only where set.
    if settings.data is not None:
        unset = {name for name in SENTENCES if getattr(settings.data, name) is None}
        of_data["calibration_data"] = settings.data.model_dump(exclude=unset)
    if recipe.statistic == "weight":
        of_data = dict.fromkeys(of_data)
    if method.solution != "subspace":
        of_subspace = dict.fromkeys(of_subspace)
    return {
        "method": adapter.method,
        "base": inputs.base,
        "dtype": name_dtype(inputs.dtype),
        "rank": choose_kept_rank(recipe),
        "corda_mode": adapter.corda_mode if method.variant == "corda_mode" else None,
        "scaling": recipe.method_settings().scaling if method.depends_on_scaling else None,
        "targets": adapter.targets,
        # Left out where there is none, as in calibrations that are older than the field.
        **({"exclude": adapter.exclude} if adapter.exclude else {}),
        **_describe_head(recipe),
        **of_data,
        **of_subspace,
        "conditions": conditions,
    }
