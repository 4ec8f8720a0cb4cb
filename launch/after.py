"""What fine-tuning did to the outputs: the spectra of a run's base and of its trained model on the same rows."""

from pathlib import Path

import torch.distributed as dist

from astra import adapter
from launch import artifact, calibration, figures, watch
from launch.distributed import on_rank0, say, start, stop
from launch.engines import Engine, make_engine
from launch.errors import UserError
from launch.files import write_json
from launch.inputs import Inputs, prepare
from launch.recipe import Recipe, read, validate

RESULT = "effective_rank.json"


def measure_run(run: Path, engine: str | None, stall: float) -> None:
    """Effective ranks of the outputs on the run's calibration rows, before and after its training.

    Every rank of a launcher calls it, with whatever engine. Writes RUN/after/effective_rank.json (module -> size,
    before, after), a figure, and the two calibrations with all eigenvalues.

    Raises UserError if `run` is not the folder of a finished run with a lora/.
    """
    device = start(stall)

    def check() -> str:
        if not (run / "results.json").is_file():
            raise UserError(f"--after: {run} is not the folder of a finished run")
        if not (run / "lora").is_dir():
            raise UserError(f"--after: {run} has no lora/ to merge into its base")
        return (run / "recipe.yaml").read_text(encoding="utf-8")

    on_rank0(check)
    recipe = _measuring(read(str(run / "recipe.yaml"), []), engine)
    watch.stage("reading the inputs")
    inputs = prepare(recipe, device)
    for when in ("before", "after"):
        folder = run / "after" / when
        if not on_rank0((folder / artifact.MANIFEST).is_file):
            _calibrate(
                inputs, make_engine(recipe.engine, device, inputs.dtype), run if when == "after" else None, folder
            )
    if dist.get_rank() == 0:
        _write(run / "after", recipe.adapter.targets)
        say(f"effective ranks before and after: {run / 'after' / RESULT} and {run / 'after' / 'effective_rank.png'}")
    stop()


def _measuring(recipe: Recipe, engine: str | None) -> Recipe:
    """`recipe` with a calibration that sees every eigenvalue, whatever the run's method needed of it."""
    values = recipe.model_dump()
    values["adapter"] |= {"method": "astra", "eigen_select": "largest", "rank_allocation": "uniform", "rank": 1}
    values["calibration"] |= {"path": None, "split_half": False}
    values["eval"] |= {"suites": [], "other_text": None}
    return validate(values | ({"engine": engine} if engine else {}))


def _calibrate(inputs: Inputs, engine: Engine, run: Path | None, folder: Path) -> None:
    """Calibrate the base into `folder`, with the adapter of `run` merged into it if given. Collective."""
    watch.stage("loading the base")
    base = engine.load(str(inputs.model_path))
    base.register_forward_pre_hook(lambda *_: watch.mark())
    linears = adapter.find_targets(base, inputs.recipe.adapter.targets)
    with engine.inference(base):  # FSDP2 shards and loads the base here
        pass
    if run is not None:
        factors, scaling = adapter.load(run / "lora")
        adapter.subtract(base, factors, -scaling, engine)
    with engine.inference(base):
        calibration.make(inputs.recipe, inputs, engine, base, linears, folder)


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
