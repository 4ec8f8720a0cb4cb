"""Keep the small files of finished runs in a folder that is committed.

A sweep starts from the runs kept there, and a report is made of them alone.
"""

from collections.abc import Sequence
from pathlib import Path

from launch.run.folder import EFFECTIVE_RANKS, STATE, read_state
from launch.run.metrics import METRICS
from launch.run.results import RESULTS
from launch.runtime.errors import UserError
from launch.runtime.files import write_json, write_text
from launch.sweeps.table import Cell, Sweep, has_diverged, has_ended

# results.json comes last: that it is there marks a run as finished.
KEPT_FILES = (Path(METRICS), EFFECTIVE_RANKS, Path(RESULTS))


def keep_runs(sweep: Sweep, cells: Sequence[Cell]) -> None:
    """Copy the small files of the cells' finished and diverged runs that are not kept yet.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        for run in sweep.list_all_runs(cells):
            _keep_run(sweep.folder / run.name, sweep.kept / run.name)
    except OSError as error:
        raise UserError(f"--keep: cannot write {sweep.kept}: {error.strerror}") from None


def _keep_run(source: Path, target: Path) -> None:
    """Copy what `target` lacks of one run, if that has ended. Raises OSError."""
    if not has_ended(source):
        return
    if has_diverged(source):
        if not has_ended(target):
            state = read_state(source)
            target.mkdir(parents=True, exist_ok=True)
            # Not the host and the process, which say nothing about the result.
            write_json(target / STATE, {"state": state["state"], "error": state.get("error")})
        return
    for name in KEPT_FILES:
        if (source / name).is_file() and not (target / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(target / name, (source / name).read_text(encoding="utf-8"))
