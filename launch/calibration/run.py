"""A recipe's calibration: made window by window, or taken from `calibration.path`."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from astra import adapter
from astra.calibrate import calibrate
from astra.errors import AstraError
from astra.moments import Batch, find_groups
from astra.spectrum import allocate
from astra.windows import make_plan
from launch.calibration import batches as samples
from launch.calibration import report as spectrum
from launch.calibration import store as artifact
from launch.config.schema import Recipe
from launch.data.inputs import Inputs, prepare
from launch.data.tokenize import TokenSet, collate
from launch.engines import Engine, make_engine
from launch.methods import registry as methods
from launch.methods.registry import CALIBRATED
from launch.run.folder import lock, make_folder
from launch.runtime import watchdog as watch
from launch.runtime.distributed import on_rank0, say, start, stop
from launch.runtime.errors import UserError
from launch.training import metrics_log as tracking
from launch.training.export import dtype_name
from launch.training.loss import label_loss

GIB = 2**30


def calibrate_alone(recipe: Recipe, folder: Path, stall: float) -> None:
    """Make the calibration of `recipe` in `folder`, for runs whose `calibration.path` it is to be.

    Every rank of a launcher calls it. Started again it goes on after the last window, and leaves a finished one alone.
    """
    device = start(stall)
    if recipe.adapter.method not in CALIBRATED:
        raise UserError(f"adapter.method: {recipe.adapter.method} needs no calibration")

    def open_folder() -> None:
        make_folder(folder)
        lock(folder / "lock")

    on_rank0(open_folder)
    watch.stage("reading the inputs")
    inputs = prepare(recipe, device)
    made = make_from_base(
        inputs.recipe, inputs, make_engine(recipe.engine, device, inputs.dtype), folder
    )
    say(
        f"the calibration is in {folder}: set calibration.path={folder}"
        if made
        else f"{folder} holds it, finished"
    )
    stop()


def make_from_base(recipe: Recipe, inputs: Inputs, engine: Engine, folder: Path) -> bool:
    """Load the base, make the calibration in `folder`, let go of the base; False if it was there. Collective."""
    if recipe.calibration.path or on_rank0(lambda: (folder / artifact.MANIFEST).is_file()):
        on_rank0(lambda: artifact.check(folder, manifest(recipe, inputs, {})))
        return False
    watch.stage("loading the base")
    base = engine.load(str(inputs.model_path))
    base.register_forward_pre_hook(lambda *_: watch.mark())
    linears = adapter.find_targets(base, recipe.adapter.targets)
    with engine.inference(base):
        make(recipe, inputs, engine, base, linears, folder)
    return True


def obtain(
    recipe: Recipe,
    inputs: Inputs,
    engine: Engine,
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    folder: Path,
) -> Path | None:
    """The folder of the recipe's calibration: `calibration.path`'s, checked, or `folder`, where it is made. Collective.

    None for a method that needs none. Raises UserError if that at `calibration.path` is not this recipe's.
    """
    if recipe.adapter.method not in CALIBRATED:
        return None
    described = manifest(recipe, inputs, {})
    if recipe.calibration.path is not None:
        source = Path(recipe.calibration.path).expanduser()
        on_rank0(lambda: artifact.check(source, described))
        on_rank0(lambda: artifact.copy_summary(source, folder))
        say(f"calibration: taken from {source}")
        return source
    if on_rank0(
        lambda: (folder / artifact.MANIFEST).is_file()
    ):  # of a start that was killed after it
        on_rank0(lambda: artifact.check(folder, described))
    else:
        make(recipe, inputs, engine, model, linears, folder)
    return folder


def make(
    recipe: Recipe,
    inputs: Inputs,
    engine: Engine,
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    folder: Path,
) -> None:
    """Calibrate `model`, as its engine's inference has it, into `folder`, from the first window not there. Collective.

    The plan is printed before it runs; the checks of the solutions, and what is doubtful, afterwards.
    """
    watch.stage("calibration", timed=True)
    started = time.perf_counter()
    settings, rank = recipe.calibration, dist.get_rank()
    ids, kind = samples.sample_ids(recipe, inputs), methods.kind(recipe)
    lengths = samples.lengths(recipe, inputs, ids)
    parts = samples.parts(recipe, inputs, ids, engine.device)
    groups = find_groups(model, linears, parts[0][0] if parts else None, kind.needs)
    plan = make_plan(
        model,
        linears,
        groups,
        tokens=int(lengths.max()) * settings.batch_size if ids else 0,
        parts=len(parts),
        memory=None if settings.memory_gib is None else settings.memory_gib * GIB,
        decomposed=kind.decomposes,
    )
    say(plan.describe())
    described = manifest(recipe, inputs, tracking.conditions(dist.get_world_size(), engine.device))
    described["windows"] = [list(window.groups) for window in plan.windows]
    done = on_rank0(lambda: artifact.begin(folder, described))
    if done:
        say(f"going on after window {done} of {len(plan.windows)}, from {folder}")
    kept = artifact.kept_rank(recipe)
    windows = calibrate(
        model,
        linears,
        parts,
        engine,
        plan,
        methods.finder(recipe),
        loss=label_loss,
        ranks={name: _rank_of(name, linear, kept, recipe) for name, linear in linears.items()},
        start=done,
        progress=lambda items, name: tracking.progress(items, len(items), name, rank),
    )
    for number, found in enumerate(windows, start=done):
        with watch.untimed():
            on_rank0(lambda number=number, found=found: artifact.save_window(folder, number, found))
    seconds, tokens = time.perf_counter() - started, int(lengths.sum())
    say(f"calibration: {len(linears)} modules, {tokens} tokens, {seconds:.1f} s")
    if recipe.adapter.method == "astra":
        reach = {
            name: min(x.out_features, x.in_features + (x.bias is not None))
            for name, x in linears.items()
        }
        for line in on_rank0(lambda: spectrum.write(folder, recipe, reach, tokens)):
            say(line)
    on_rank0(lambda: artifact.finish(folder, {"tokens": tokens, "seconds": seconds}))


def _rank_of(name: str, linear: nn.Linear, kept: int, recipe: Recipe) -> int:
    smaller = min(linear.in_features, linear.out_features)
    if recipe.adapter.rank > smaller:
        raise AstraError(
            f"adapter.rank: {recipe.adapter.rank} is above the smaller side, {smaller}, of {name}"
        )
    if recipe.adapter.method == "lora_ga" and 2 * recipe.adapter.rank > smaller:
        raise AstraError(
            f"adapter.rank: lora_ga needs twice {recipe.adapter.rank}, and {name} has a side of {smaller}"
        )
    return min(kept, smaller)


def allocated_ranks(recipe: Recipe, folder: Path) -> dict[str, int] | None:
    """Each module's rank from its effective rank in the calibration in `folder`; None for uniform ranks. Collective."""
    if recipe.adapter.rank_allocation == "uniform":
        return None
    figures = on_rank0(lambda: artifact.summary(folder)["modules"])
    return allocate(
        {name: module["effective_rank"] for name, module in figures.items()},
        {name: module["rank"] for name, module in figures.items()},
        recipe.adapter.rank,
    )


def manifest(recipe: Recipe, inputs: Inputs, conditions: dict) -> dict:
    """Everything that decides what is found, to go beside it; None where the method does not look at it."""
    settings, wanted = recipe.calibration, recipe.adapter
    of_data = {
        "data": inputs.data,
        "prompt": samples.prompt(recipe),
        "max_length": recipe.data.max_length,
        "sample_ids": samples.sample_ids(recipe, inputs),
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "split_half": settings.split_half,
    }
    of_astra = {
        "eigen_select": wanted.eigen_select,
        "statistics": settings.statistics,
        "tie_break": "where eigenvalues are zero: fixed Gaussian directions from (seed, module name), projected first "
        "onto what the weight cannot reach, then onto the null space of the moment",
    }
    return {
        "method": wanted.method,
        "base": inputs.base,
        "dtype": dtype_name(inputs.dtype),
        "rank": artifact.kept_rank(recipe),
        "corda_mode": wanted.corda_mode if wanted.method == "corda" else None,
        "scaling": methods.scaling(recipe) if wanted.method in methods.SCALED else None,
        "targets": wanted.targets,
        **(of_data if methods.kind(recipe).needs != "weight" else dict.fromkeys(of_data)),
        **(of_astra if wanted.method == "astra" else dict.fromkeys(of_astra)),
        "conditions": conditions,
    }


def probe(tokens: TokenSet, engine: Engine) -> Batch:
    """One training row of this rank, on which the change of the logits at step 0 is measured."""
    return collate(tokens, [dist.get_rank() % len(tokens)], engine.device)[0]


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of `batch`, (rows, tokens, vocabulary), fp32. Collective for a sharded model."""
    return model(input_ids=batch["input_ids"], use_cache=False).logits.float()
