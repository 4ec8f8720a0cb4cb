"""Proves which jobs a sweep has, and which of them it takes for done.

Needs nothing, starts no process; takes 10 seconds. tests/distributed/test_sweep.py runs jobs.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launch import sweep as sweep_command
from launch.calibration import effective_rank
from launch.config.loading import RECIPES
from launch.sweeps import jobs
from launch.sweeps.render import render_markdown
from launch.sweeps.summary import collect_groups
from launch.sweeps.table import read_table
from tests.support.sweeps import make_results, make_sweep, write_results

SCORES = {"a_1": [0.2, 0.21, 0.2], "b": [0.8, 0.81, 0.83], "c": [None] * 3}


def read_files(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Return the content and the time of the last change of every file."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


@pytest.fixture
def list_states(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], dict[str, str]]:
    """A function that returns the state of every job, as sweep.py --list prints it."""

    def list_states(options: list[str]) -> dict[str, str]:
        monkeypatch.setattr(sys, "argv", ["sweep.py", *options, "--list"])
        sweep_command.main()
        lines = capsys.readouterr().out.splitlines()
        return {line.split()[1]: line.split()[0] for line in lines if line.startswith("    ")}

    return list_states


def test_a_changed_recipe_makes_new_rows_and_keeps_the_old(
    tmp_path: Path, list_states: Callable[[list[str]], dict[str, str]]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text((RECIPES / "metamath.yaml").read_text())
    old = make_sweep(tmp_path, SCORES, recipe=str(recipe))
    options = ["--table", str(tmp_path / "t.yaml"), "--output", str(old.folder)]
    before, files = list_states(options), read_files(old.folder)
    assert sorted(before.values()) == ["done"] * 6 + ["missing"] * 3

    values = yaml.safe_load(recipe.read_text())
    values["train"] = values.get("train", {}) | {"weight_decay": 0.125}
    recipe.write_text(yaml.safe_dump(values))
    after = list_states(options)
    assert sorted(after.values()) == ["missing"] * 9
    assert not after.keys() & before.keys()

    new = read_table(str(tmp_path / "t.yaml"), (), old.folder)
    run = new.eval_runs(new.list_cells()[0])["recipe"][0]
    write_results(new, run, make_results(0.4))
    assert list_states(options) == after | {run.name: "done"}
    shown = render_markdown(new, collect_groups(new))
    assert "| a_1 | 2e-05 | 1 of 3 | 40.0 |" in shown
    assert "| b | 2e-05 | 0 of 3 |  |" in shown
    kept = {path: of for path, of in read_files(old.folder).items() if run.name not in path.parts}
    assert kept == files


def test_effective_ranks_are_measured_once_the_first_run_has_finished(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, SCORES, spectra=True)
    finished, _, missing = sweep.list_cells()
    first_run = sweep.folder / sweep.eval_runs(finished)["recipe"][0].name
    measurement = jobs.list_jobs(sweep, finished)[-1]
    assert measurement.command[1:] == ("--after", str(first_run))
    assert measurement.output == first_run / effective_rank.EFFECTIVE_RANKS
    assert not jobs.is_done(measurement)
    assert len(jobs.list_jobs(sweep, missing)) == 3
    assert [jobs.count_jobs(sweep, cell) for cell in (finished, missing)] == [4, 4]


def test_what_is_not_measured_any_more_is_not_waited_for(tmp_path: Path) -> None:
    """The first run diverged, or is kept without its effective ranks."""
    sweep = make_sweep(tmp_path, SCORES, spectra=True)
    sweep = replace(sweep, kept=tmp_path / "kept")
    kept, _, diverged = sweep.list_cells()
    for run in sweep.eval_runs(kept)["recipe"]:
        (sweep.kept / run.name).mkdir(parents=True)
        (sweep.folder / run.name / "results.json").rename(sweep.kept / run.name / "results.json")
    folder = sweep.folder / sweep.eval_runs(diverged)["recipe"][0].name
    folder.mkdir()
    (folder / "state.json").write_text('{"state": "diverged"}')
    assert [jobs.count_jobs(sweep, cell) for cell in (kept, diverged)] == [3, 3]
    assert len(jobs.list_jobs(sweep, kept)) == len(jobs.list_jobs(sweep, diverged)) == 3
