"""Read what the folder of a run holds so far: all of a finished run, and of a running one its part."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from launch.calibration.store import SPECTRUM, read_summary
from launch.config.loading import flatten_recipe, read_stored_recipe
from launch.config.schema import Recipe
from launch.run.folder import BASELINE, RECIPE, read_state
from launch.run.metrics import METRICS, Metrics, read_metrics
from launch.run.results import RunResults, find_run_results
from launch.runtime.errors import UserError
from launch.scoring.responses import GENERATIONS, read_generations
from launch.stages.records import CALIBRATION, WHILE_TRAINING


@dataclass(frozen=True)
class RunRecord:
    """What is in a run folder now."""

    folder: Path
    name: str  # told apart from the other runs of the page
    state: str  # of state.json: running, preempted, error, diverged, finished
    error: str | None  # why the run ended, if it failed
    recipe: Recipe
    recipe_text: str
    fields: dict[str, Any]  # of recipe: field with its section, such as train.lr -> value
    results: RunResults | None  # None until the run has finished
    steps: list[Metrics]
    num_steps: int | None  # of the whole run; None where that is not known yet
    last_step_at: datetime | None  # when metrics.jsonl was last written, UTC

    @property
    def label(self) -> str:
        """The method with its variant."""
        return self.recipe.label if self.results is None else self.results.label


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read run folders. Raises UserError: one of them is no run folder, or is given twice."""
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{folder} is given twice; name every run folder once")
    names = [place.name for place in places]
    records = []
    for folder, place in zip(folders, places, strict=True):
        name = place.name if names.count(place.name) == 1 else str(folder)
        records.append(read_run(folder, name))
    return records


def read_run(folder: Path, name: str) -> RunRecord:
    """Read one run folder; see RunRecord.

    Raises:
        UserError: it has no readable recipe.yaml, or a file in it is damaged.
    """
    text = _read_recipe_text(folder)
    return make_record(folder, name, read_stored_recipe(folder / RECIPE), text)


def make_record(folder: Path, name: str, recipe: Recipe, recipe_text: str) -> RunRecord:
    """Read what is in a run folder beside its recipe. Raises UserError: a file in it is damaged."""
    steps = read_metrics(folder) if (folder / METRICS).is_file() else []
    results = find_run_results(folder)
    state = _read_state(folder, finished=results is not None)
    last_step_at = None
    if steps:
        written = (folder / METRICS).stat().st_mtime
        last_step_at = datetime.fromtimestamp(written, UTC)
    return RunRecord(
        folder=folder,
        name=name,
        state=state["state"],
        error=state.get("error"),
        recipe=recipe,
        recipe_text=recipe_text,
        fields=flatten_recipe(recipe),
        results=results,
        steps=steps,
        num_steps=results.steps if results is not None else _estimate_num_steps(steps),
        last_step_at=last_step_at,
    )


def _read_recipe_text(folder: Path) -> str:
    try:
        text = (folder / RECIPE).read_text(encoding="utf-8")
        is_recipe = isinstance(yaml.safe_load(text), dict)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        is_recipe = False
    if not is_recipe:
        raise UserError(f"{folder} is not the folder of a run: it has no readable {RECIPE}")
    return text


def _read_state(folder: Path, finished: bool) -> dict[str, Any]:
    """Return state.json; results.json alone decides whether the run has finished."""
    if finished:
        return {"state": "finished"}
    return read_state(folder) or {"state": "unfinished"}


def _estimate_num_steps(steps: Sequence[Metrics]) -> int | None:
    """Return the number of steps of the whole run, which `seconds_left` of its last step implies."""
    if not steps:
        return None
    last = steps[-1]
    if not last.get("seconds"):
        return None
    return round(last["step"] * (1 + last["seconds_left"] / last["seconds"]))


def read_spectra(folder: Path) -> dict[str, dict]:
    """Return the modules of the calibration's spectrum.json; none where there is no such file."""
    calibration = folder / CALIBRATION
    return read_summary(calibration)["modules"] if (calibration / SPECTRUM).is_file() else {}


def read_responses(folder: Path, name: str) -> dict[str, list[dict]]:
    """Return the responses of a run's base and of the run, as name -> rows of generations.jsonl.

    Raises:
        UserError: a line that is whole is not JSON.
    """
    return _read_places({f"{name}, before training": folder / BASELINE, name: folder})


def read_responses_while_training(folder: Path, name: str) -> dict[str, list[dict]]:
    """Return the responses of a run while it trained, as name -> rows of generations.jsonl.

    Raises:
        UserError: a line that is whole is not JSON.
    """
    places = {}
    for place in sorted((folder / WHILE_TRAINING).glob("step-*")):
        places[f"{name}, after step {int(place.name.removeprefix('step-'))}"] = place
    return _read_places(places)


def _read_places(places: dict[str, Path]) -> dict[str, list[dict]]:
    """Read the responses in the folders that have some."""
    responses = {}
    for source, place in places.items():
        if (place / GENERATIONS).is_file():
            responses[source] = read_generations(place / GENERATIONS)
    return responses
