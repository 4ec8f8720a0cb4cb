"""What fine-tuning did to the outputs: the spectra of a run's base and of its trained model on the same rows."""

from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from astra import adapter
from launch.calibration import run as calibration
from launch.calibration import store as artifact
from launch.config.schema import Recipe, read, validate
from launch.data.inputs import Inputs, prepare
from launch.engines import Engine, make_engine
from launch.run import plots as figures
from launch.runtime import watchdog as watch
from launch.runtime.distributed import on_rank0, say, start, stop
from launch.runtime.errors import UserError
from launch.runtime.files import write_json

RESULT = "effective_rank.json"
EXPORTS = (
    "model",
    "lora",
    "adapter",
)  # of a run, the first that is there: `adapter` alone is on the original base


def measure_run(run: Path, engine: str | None, stall: float) -> None:
    """Effective ranks of the outputs on the run's calibration rows, before and after its training.

    Every rank of a launcher calls it, with whatever engine. Writes RUN/after/effective_rank.json (module -> size,
    before, after), a figure, and the two calibrations with all eigenvalues.

    Raises UserError if `run` is not the folder of a finished run.
    """
    device = start(stall)

    def check() -> Path:
        there = [run / name for name in EXPORTS if (run / name).is_dir()]
        if not there or not (run / "results.json").is_file():
            raise UserError(f"--after: {run} is not the folder of a finished run")
        return there[0]

    exported = on_rank0(check)
    recipe = _measuring(read(str(run / "recipe.yaml"), []), engine)
    watch.stage("reading the inputs")
    inputs = prepare(recipe, device)
    for when in ("before", "after"):
        folder = run / "after" / when
        if not on_rank0((folder / artifact.MANIFEST).is_file):
            trained = exported if when == "after" else None
            _calibrate(inputs, make_engine(recipe.engine, device, inputs.dtype), trained, folder)
    if dist.get_rank() == 0:
        _write(run / "after", recipe.adapter.targets)
        say(
            f"effective ranks before and after: {run / 'after' / RESULT} and {run / 'after' / 'effective_rank.png'}"
        )
    stop()


def _measuring(recipe: Recipe, engine: str | None) -> Recipe:
    """`recipe` with a calibration that sees every eigenvalue, whatever the run's method needed of it."""
    kept = recipe.calibration.model_dump(include={"samples", "batch_size", "seed", "memory_gib"})
    values = recipe.model_dump(include={"model", "data", "train", "engine"})
    values["adapter"] = {
        "method": "astra",
        "eigen_select": "largest",
        "rank": 1,
        "targets": recipe.adapter.targets,
    }
    return validate(values | {"calibration": kept} | ({"engine": engine} if engine else {}))


def _calibrate(inputs: Inputs, engine: Engine, trained: Path | None, folder: Path) -> None:
    """Calibrate the base, or the model that `trained` makes of it, into `folder`. Collective."""
    watch.stage("loading the base")
    whole = trained is not None and trained.name == "model"
    base = engine.load(str(trained if whole else inputs.model_path))
    base.register_forward_pre_hook(lambda *_: watch.mark())
    linears = adapter.find_targets(base, inputs.recipe.adapter.targets)
    with engine.inference(base):  # FSDP2 shards and loads the base here
        pass
    if trained is not None and not whole:
        _merge(base, trained, engine)
    with engine.inference(base):
        calibration.make(inputs.recipe, inputs, engine, base, linears, folder)


def _merge(base: nn.Module, folder: Path, engine: Engine) -> None:
    """`W + s B A` of the adapter in `folder` in the place of every W; of DoRA, its rows at their trained lengths."""
    factors, scaling = adapter.load(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, (a, b) in factors.items():
        parameter = base.get_submodule(name).weight
        weight = engine.read(parameter)
        merged = weight.double() + scaling * (b.double() @ a.double()).to(weight.device)
        if (length := tensors.get(f"base_model.model.{name}.lora_magnitude_vector")) is not None:
            merged *= (length.to(merged) / merged.norm(dim=1))[:, None]
        engine.write(parameter, merged.to(weight.dtype))


def _write(folder: Path, targets: list[str]) -> None:
    before, after = (artifact.summary(folder / when)["modules"] for when in ("before", "after"))
    modules = {
        name: {"size": before[name]["size"]}
        | {when: of[name]["effective_rank"] for when, of in (("before", before), ("after", after))}
        for name in sorted(before, key=lambda name: _place(name, targets))
    }
    figures.effective_rank(figures.by_layer(modules), folder / "effective_rank.png")
    write_json(folder / RESULT, modules)


def _place(name: str, targets: list[str]) -> tuple:
    """Where a module comes: by layer, as a number, then as the recipe lists its kind."""
    kind = next(i for i, target in enumerate(targets) if f".{name}".endswith(f".{target}"))
    return [int(part) for part in name.split(".") if part.isdigit()], kind, name
