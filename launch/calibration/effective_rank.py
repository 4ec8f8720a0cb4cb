"""Measure what fine-tuning did to the outputs of the adapted modules: their effective ranks.

Both are measured on the run's calibration rows: before with the run's base, after with its trained
model. The effective rank is the exponential of the entropy of the normalised eigenvalues of the
outputs' second moment (astra.spectrum).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from astra.adapter import ADAPTER_WEIGHTS, PREFIX, load_adapter, merge_factors
from launch.calibration.batches import list_examples
from launch.calibration.report import group_by_kind, list_layers, place_module
from launch.calibration.run import load_base, make_calibration
from launch.calibration.store import is_finished, read_summary
from launch.config.loading import read_stored_recipe, validate_recipe
from launch.config.schema import Recipe
from launch.data.inputs import Inputs
from launch.engines import Engine, make_engine
from launch.models.check import check_model
from launch.models.identity import differs
from launch.run import plots
from launch.run.folder import EFFECTIVE_RANKS, RECIPE
from launch.run.results import RESULTS, read_run_results
from launch.runtime import watchdog
from launch.runtime.distributed import print_rank0, run_on_rank0
from launch.runtime.errors import UserError
from launch.runtime.files import write_json
from launch.runtime.memory import free_dropped_models

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = "after"  # in the run folder; holds everything that is measured here
MODELS = ("before", "after")  # in FOLDER: calibrations of the base and of the trained model
FIGURE = "effective_rank.png"
# Exports of a run. The first that exists is measured. `adapter` is valid on the original base only
# where the run exported no `lora`.
EXPORTS = ("model", "lora", "adapter")


class RankChange(NamedTuple):
    """Effective rank of a module's outputs before and after training."""

    before: float
    after: float


def measure_effective_ranks(
    run: Path, recipe: Recipe, inputs: Inputs, device: torch.device
) -> None:
    """Measure effective ranks before and after the training of `run`. Collective.

    Writes RUN/after/effective_rank.json (module -> size, before, after), a figure beside it, and
    the two calibrations with all eigenvalues. A calibration that is already there is kept.

    Args:
        run: folder of a finished run.
        recipe: see `make_measuring_recipe` and `limit_samples`.
        inputs: of `recipe`.
    """
    exported = _find_export(run)
    run_on_rank0(lambda: _check_inputs(run, inputs))
    for when in MODELS:
        folder = run / FOLDER / when
        if not run_on_rank0(lambda folder=folder: is_finished(folder)):
            trained = exported if when == "after" else None
            _calibrate_model(recipe, inputs, device, trained, folder)
            free_dropped_models()
    run_on_rank0(lambda: _write_comparison(run, recipe.adapter.targets))
    print_rank0(
        f"effective ranks before and after: {run / EFFECTIVE_RANKS} and {run / FOLDER / FIGURE}"
    )


def _find_export(run: Path) -> Path:
    """Return the folder of the trained model. Raises UserError if the run has not finished.

    Collective.
    """

    def find_export() -> Path:
        exports = [run / name for name in EXPORTS if (run / name).is_dir()]
        if not exports or not (run / RESULTS).is_file():
            raise UserError(f"--after: {run} is not the folder of a finished run")
        return exports[0]

    return run_on_rank0(find_export)


def find_unfinished(run: Path) -> Path:
    """Return the first of the run's two calibrations that is not finished, or the last. Collective."""

    def find() -> Path:
        folders = [run / FOLDER / when for when in MODELS]
        unfinished = [folder for folder in folders if not is_finished(folder)]
        return unfinished[0] if unfinished else folders[-1]

    return run_on_rank0(find)


def _check_inputs(run: Path, inputs: Inputs) -> None:
    """Raise UserError if the base or the rows are not those that `run` was trained on."""
    results = read_run_results(run)
    field = "data.sources" if inputs.data.get("sources") else "data.path"
    compared = {
        "the weights of model.name": (results.base.weights_sha256, inputs.base["weights_sha256"]),
        "config.json of model.name": (results.base.config_sha256, inputs.base["config_sha256"]),
        f"the rows of {field}": (
            results.data.tokens_sha256,
            inputs.data["tokens_sha256"],
        ),
    }
    for what, (there, here) in compared.items():
        if differs(there, here):
            raise UserError(f"--after: {what} changed since {run} was trained; bring that back")


def make_measuring_recipe(run: Path, engine: str | None) -> Recipe:
    """Return the recipe of `run` with a calibration that sees every eigenvalue. Collective.

    Args:
        run: folder of a finished run, of any method.
        engine: that runs the model; the one that trained it when None or `auto`.

    Raises:
        UserError: `run` is not the folder of a finished run, or its base has no outputs.
    """
    _find_export(run)
    recipe = read_stored_recipe(run / RECIPE)
    if recipe.model.new_weights:
        raise UserError(
            f"--after: {run} drew {recipe.model.new_weights[0]} (model.new_weights), so its base is "
            "no whole model and there is nothing to measure before training"
        )
    calibrated = recipe.calibration.model_dump(
        include={"samples", "batch_size", "seed", "memory_gib", "data"}
    )
    values = recipe.model_dump(include={"model", "data", "task", "train", "engine"})
    values["task"]["dev"] = None  # its rows are not measured
    values["train"] |= {"keep_best": None, "patience": None}  # nothing is scored
    values["calibration"] = calibrated
    values["adapter"] = {
        "method": "astra",
        "eigen_select": "largest",
        "rank": 1,
        "targets": recipe.adapter.targets,
        "exclude": recipe.adapter.exclude,
    }
    if engine:
        values["engine"] = engine
    if values["engine"] == "auto":
        values["engine"] = read_run_results(run).engine
    return validate_recipe(values)


def limit_samples(recipe: Recipe, inputs: Inputs) -> Recipe:
    """Return the measuring recipe with no more samples than there are examples, and print that.

    The run's own method may need no calibration, and then nothing has checked calibration.samples.
    """
    settings = recipe.calibration
    num_examples = len(list_examples(recipe, inputs))
    if settings.samples <= num_examples:
        return recipe
    print_rank0(
        f"calibration.samples: {settings.samples} is above the {num_examples} examples that there "
        "are; all of them are measured"
    )
    calibration = settings.model_copy(update={"samples": num_examples})
    return recipe.model_copy(update={"calibration": calibration})


def _calibrate_model(
    recipe: Recipe, inputs: Inputs, device: torch.device, trained: Path | None, folder: Path
) -> None:
    """Calibrate the base, or the model whose export is `trained`, into `folder`. Collective."""
    watchdog.set_phase("loading the base")
    is_model = trained is not None and trained.name == "model"
    checked = inputs.model
    if is_model:
        head = inputs.head
        checked = run_on_rank0(
            lambda: check_model(trained, "--after", head=head, head_is_stored=True)
        )
    engine = make_engine(recipe.engine, device, inputs.dtype)
    # The values that are drawn for a new head do not matter: it reads what is measured.
    base, linears = load_base(recipe, checked, engine)
    if trained is not None and not is_model:
        _merge_adapter(base, trained, engine)
    with engine.inference_mode(base):
        make_calibration(recipe, inputs, engine, base, linears, folder)


def _merge_adapter(base: nn.Module, folder: Path, engine: Engine) -> None:
    """Replace every adapted weight W of `base` by W + s B A of the adapter in `folder`. Collective.

    Where the adapter has DoRA's magnitudes, the rows of the sum are scaled to them.
    """
    adapter, scaling = load_adapter(folder)
    tensors = load_file(folder / ADAPTER_WEIGHTS[0])
    for name, factors in adapter.items():
        parameter = base.get_submodule(name).weight
        weight = engine.read(parameter)
        magnitude = tensors.get(f"{PREFIX}{name}.lora_magnitude_vector")
        merged = merge_factors(weight, factors, scaling, magnitude)
        engine.write(parameter, merged.to(weight.dtype))


def _write_comparison(run: Path, targets: list[str]) -> None:
    """Write effective_rank.json and its figure from the two calibrations of `run`."""
    before = read_summary(run / FOLDER / "before")["modules"]
    after = read_summary(run / FOLDER / "after")["modules"]
    modules = {}
    for name in sorted(before, key=lambda name: place_module(name, targets)):
        modules[name] = {
            "size": before[name]["size"],
            "before": before[name]["effective_rank"],
            "after": after[name]["effective_rank"],
        }
    changes = _get_changes(modules)
    plot_effective_ranks(group_by_layer(changes), run / FOLDER / FIGURE)
    write_json(run / EFFECTIVE_RANKS, modules)


def read_effective_ranks(run: Path) -> dict[str, RankChange]:
    """Read the effective ranks of a run's modules; none where they were not measured."""
    path = run / EFFECTIVE_RANKS
    if not path.is_file():
        return {}
    return _get_changes(json.loads(path.read_text(encoding="utf-8")))


def _get_changes(modules: Mapping[str, Mapping[str, float]]) -> dict[str, RankChange]:
    """Return the effective ranks of the modules of effective_rank.json."""
    return {name: RankChange(row["before"], row["after"]) for name, row in modules.items()}


def group_by_layer(changes: Mapping[str, RankChange]) -> dict[str, dict[str, RankChange]]:
    """Group the modules of a run as `layer 0` -> kind -> change."""
    layers: dict[int, dict[str, RankChange]] = {}
    for kind, names in group_by_kind(changes).items():
        for layer, name in zip(list_layers(names), names, strict=True):
            layers.setdefault(layer, {})[kind] = changes[name]
    return {f"layer {layer}": layers[layer] for layer in sorted(layers)}


def average_by_kind(changes: Mapping[str, RankChange]) -> dict[str, RankChange]:
    """Return the means over the layers of a run, by kind of module."""
    means = {}
    for kind, names in group_by_kind(changes).items():
        before, after = np.mean([changes[name] for name in names], axis=0).tolist()
        means[kind] = RankChange(before, after)
    return means


def plot_effective_ranks(rows: Mapping[str, Mapping[str, RankChange]], path: Path) -> Path:
    """Draw effective ranks before (a tick) and after (a dot), and return `path`.

    Args:
        rows: label -> kind of module -> change; a line for each label in the panel of each kind.
    """
    kinds = list(dict.fromkeys(kind for changes in rows.values() for kind in changes))
    num_columns = min(4, len(kinds))
    num_rows = -(-len(kinds) // num_columns)
    figure, axes = plots.make_figure(num_columns, num_rows, 2.7, 1.1 + 0.22 * len(rows))
    for index, (axis, kind) in enumerate(zip(axes.flat, kinds, strict=False)):
        changes = {y: row[kind] for y, row in enumerate(rows.values()) if kind in row}
        _draw_changes(axis, changes)
        is_first_column = index % num_columns == 0
        axis.set_yticks(range(len(rows)), list(rows) if is_first_column else [])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_title(kind, fontsize="medium")
        axis.margins(x=0.12)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    for axis in axes.flat[len(kinds) :]:
        axis.set_visible(False)
    figure.supxlabel(
        "effective rank of the outputs on the calibration rows: | before, dot after",
        fontsize="medium",
    )
    return plots.save_figure(figure, path)


def _draw_changes(axis: "Axes", changes: Mapping[int, RankChange]) -> None:
    """Draw the change of each row of a panel: a line from a tick to a dot."""
    for y, change in changes.items():
        axis.plot(list(change), [y, y], color=plots.COLOURS[0], linewidth=1.2, zorder=2)
    rows = list(changes)
    before = [change.before for change in changes.values()]
    after = [change.after for change in changes.values()]
    axis.plot(before, rows, "|", color="black", markersize=9)
    axis.plot(after, rows, "o", color=plots.COLOURS[1], markersize=4.5)
