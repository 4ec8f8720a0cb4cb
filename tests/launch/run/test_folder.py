"""A run folder takes one run, once at a time, and knows it again.

Needs nothing but fork. Takes 3 s.
"""

import json
import multiprocessing
import os
from pathlib import Path
from time import sleep

import pytest

from launch.config.loading import dump_recipe, read_recipe
from launch.run.folder import open_run
from launch.runtime import locks
from launch.runtime.errors import UserError
from launch.runtime.locks import FolderLock

RECIPE = read_recipe("codefeedback", [])


def open_once(folder: Path, overrides: list[str]) -> bool:
    """Open the folder as a start with `overrides` does, and let go of it."""
    return open_run(folder, read_recipe("codefeedback", overrides), FolderLock(folder))


def test_scores_of_other_settings_do_not_choose_the_best_step(tmp_path: Path) -> None:
    every = ["data.held_out=8", "eval.every=10", "eval.suites=[mbpp]"]
    open_once(tmp_path / "free", every)
    open_once(tmp_path / "free", [*every, "eval.every=5", "eval.limit=3"])
    best = [*every, "train.keep_best=held_out"]
    open_once(tmp_path / "best", best)
    open_once(tmp_path / "best", [*best, "eval.batch_size=1", "eval.suites=[humaneval]"])
    with pytest.raises(UserError, match=r"with another eval\.every \(10, now 5\)"):
        open_once(tmp_path / "best", [*best, "eval.every=5"])


def test_a_base_that_was_not_scored_before_training_is_not_asked_for_later(tmp_path: Path) -> None:
    every = ["data.held_out=8", "eval.every=10", "train.keep_best=held_out"]
    for name, settings in (("free", []), ("best", every)):
        open_once(tmp_path / name, settings)
        with pytest.raises(UserError, match=r"with another eval\.baseline \(false, now true\)"):
            open_once(tmp_path / name, [*settings, "eval.baseline=true"])
        assert not open_once(tmp_path / name, [*settings, "eval.suites=[humaneval]"])


def test_the_bases_scores_keep_their_settings(tmp_path: Path) -> None:
    scored = ["eval.baseline=true", "eval.suites=[gsm8k]"]
    open_once(tmp_path / "run", scored)
    open_once(tmp_path / "run", [*scored, "eval.batch_size=1", "eval.suites=[gsm8k, math]"])
    for other in ("eval.prompt=literature", "eval.limit=3", "eval.baseline=false"):
        with pytest.raises(UserError, match=f"with another {other.split('=')[0]}"):
            open_once(tmp_path / "run", [*scored, "eval.suites=[gsm8k, math]", other])


def test_a_run_begins_resumes_and_is_finished(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert not open_once(folder, [])
    assert (folder / "recipe.yaml").read_text() == dump_recipe(RECIPE)
    assert json.loads((folder / "state.json").read_text()) == {
        "state": "running",
        "host": os.uname().nodename,
        "pid": os.getpid(),
    }
    assert not open_once(folder, ["engine=single"])  # free to change
    with pytest.raises(
        UserError, match=r"an unfinished run with another train\.lr \(2.0e-05, now 1.0\)"
    ):
        open_once(folder, ["train.lr=1"])
    (folder / "results.json").touch()
    assert open_once(folder, ["engine=single"])
    assert json.loads((folder / "state.json").read_text())["state"] == "finished"
    with pytest.raises(UserError, match="a finished run with another engine"):
        open_once(folder, [])


def test_a_run_of_a_version_with_old_names_is_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    open_once(folder, [])
    (folder / "recipe.yaml").write_text(dump_recipe(RECIPE, old_names=True))
    assert not open_once(folder, [])
    with pytest.raises(UserError, match=r"another data\.filter \({lang: python}, now {lang: c}\)"):
        open_once(folder, ["data.filter={lang: c}"])


def test_a_start_that_was_killed_while_it_wrote_the_recipe_is_started_again(tmp_path: Path) -> None:
    for name in ("lock", "recipe.yaml.tmp"):
        (tmp_path / name).write_text("mod")
    assert not open_once(tmp_path, [])


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="holds other files"):
        open_once(tmp_path, [])


def test_a_second_start_waits_and_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(locks, "WAIT", 0.5)
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    holder = fork.Process(target=hold_folder, args=(tmp_path, there))
    holder.start()
    assert here.poll(10) and here.recv() == "held"
    place = f"host {os.uname().nodename}, pid {holder.pid}"
    remedy = f"stop that run or choose .*; if that machine is gone, delete {tmp_path / 'lock'}$"
    with pytest.raises(UserError, match=f"is in use by {place}; {remedy}"):
        open_once(tmp_path, [])
    assert f"in use by {place}; waiting up to 0 s for it to end" in capsys.readouterr().out
    holder.kill()  # the lock ends with the process, however that ends
    holder.join(10)
    assert not open_once(tmp_path, [])


def hold_folder(folder: Path, pipe: multiprocessing.connection.Connection) -> None:
    """Open the folder, say so, and keep its lock until killed."""
    lock = FolderLock(folder)
    open_run(folder, RECIPE, lock)
    pipe.send("held")
    sleep(60)
