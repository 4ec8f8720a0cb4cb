"""A run's folder: one run, started once at a time, and what has become of it."""

import json
import os
import socket
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from launch.config.loading import dump_recipe, find_difference, read_stored_recipe
from launch.config.schema import Eval, Recipe
from launch.run.results import RESULTS
from launch.runtime.errors import UserError
from launch.runtime.files import write_json, write_text
from launch.runtime.locks import FolderLock

# Files and folders of a run folder, beside those that have a module of their own.
RECIPE, STATE = "recipe.yaml", "state.json"
BASELINE = "baseline"  # the responses of the base before training
EFFECTIVE_RANKS = Path("after") / "effective_rank.json"  # of launch/calibrate.py --after
# Fields that change no result. Even a finished run may be started again with other values of them.
OF_COMPUTATION = ("calibration.memory_gib", "calibration.reduction", "note")
# Fields that may change when a run resumes: they change neither its losses nor its subspaces,
# beyond rounding. Of `eval` see `_list_free`.
FREE_TO_CHANGE = (
    *OF_COMPUTATION,
    "engine",
    "shard_within",
    "data.prepared",  # the tokens themselves are compared
    "data.on_bad_row",
    "tracking",
    "export",
    "model.attention",
    "data.packing",
    "train.micro_batch",
    "train.gradient_checkpointing",
    "train.compile",
    "train.liger",
    "train.checkpoint_every",
    "train.keep",
)
# Fields of `eval` that do not change the scores while training.
FREE_IN_EVAL = ("suites", "samples", "batch_size", "allow_unsandboxed")


def open_run(folder: Path, recipe: Recipe, lock: FolderLock) -> bool:
    """Make and lock the run folder and write recipe.yaml. Rank 0 calls it.

    Args:
        folder: made if it is not there.
        recipe: of the run.
        lock: of the folder; the caller keeps it until the run ends.

    Returns:
        Whether the folder already holds this very run, finished.

    Raises:
        UserError: the folder holds another run or other files, another start uses it, or it cannot
            be written.
    """
    make_folder(folder)
    recipe_path = folder / RECIPE
    others = {path.name for path in folder.iterdir()} - {"lock", f"{RECIPE}.tmp"}  # left by a kill
    if others and not recipe_path.is_file():
        raise UserError(f"--output: {folder} holds other files; choose an empty or new folder")
    lock.acquire()
    if recipe_path.is_file():
        finished = (folder / RESULTS).is_file()
        _refuse_another_run(folder, read_stored_recipe(recipe_path), recipe, finished)
        if finished:
            write_state(folder, "finished")
            return True
    write_text(recipe_path, dump_recipe(recipe))
    write_state(folder, "running")
    return False


def _refuse_another_run(folder: Path, stored: Recipe, recipe: Recipe, finished: bool) -> None:
    """Raise UserError if `folder` holds a run that `recipe` does not resume."""
    field = find_difference(stored, recipe, _list_free(stored, recipe, finished))
    if field:
        state = "a finished" if finished else "an unfinished"
        raise UserError(
            f"--output: {folder} holds {state} run with another {field}; choose another folder"
        )


def _list_free(stored: Recipe, recipe: Recipe, finished: bool) -> tuple[str, ...]:
    """List the fields and sections that may have changed."""
    if finished:
        return OF_COMPUTATION
    # Scores of other settings are not to be compared with the base's, or with the best one so far.
    if stored.eval.baseline:
        of_eval = [name for name in FREE_IN_EVAL if name != "samples"]
    elif recipe.train.keep_best is not None:
        of_eval = list(FREE_IN_EVAL)
    else:
        # The base is scored before training alone.
        of_eval = [name for name in Eval.model_fields if name != "baseline"]
    return (*FREE_TO_CHANGE, *(f"eval.{name}" for name in of_eval))


def write_state(
    folder: Path, state: str, error: str | None = None, exit_code: int | None = None
) -> None:
    """Write state.json.

    Args:
        folder: of the run.
        state: `running`, `preempted` (asked to stop; start it again), `error` (something to mend),
            `diverged` or `finished`.
        error: the line that says why the run ended.
        exit_code: that belongs to the error: 1 if the same command may succeed, 2 if not.
    """
    value: dict[str, str | int] = {"state": state, "host": socket.gethostname(), "pid": os.getpid()}
    if error is not None:
        value |= {"error": error, "exit_code": exit_code}
    write_json(folder / STATE, value)


def read_state(folder: Path) -> dict[str, Any] | None:
    """Read state.json of a run folder; None where there is none."""
    path = folder / STATE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def make_folder(folder: Path) -> None:
    """Make an output folder, if need be. Raises UserError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output: cannot write {folder}: {error.strerror}") from None
