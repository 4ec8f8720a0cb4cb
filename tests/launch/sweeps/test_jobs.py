"""Proves which jobs a sweep has, which of them it takes for done, and how a launcher is told to stop.

Needs bash: a script stands in for the launchers. Takes 10 seconds. tests/distributed/test_sweep.py
runs jobs.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from launch import sweep as sweep_command
from launch.calibration import effective_rank
from launch.config.loading import RECIPES
from launch.runtime.errors import UserError
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
    run = new.list_eval_runs(new.list_cells()[0])["recipe"][0]
    write_results(new, run, make_results(0.4))
    assert list_states(options) == after | {run.name: "done"}
    shown = render_markdown(new, collect_groups(new))
    assert "| a_1 | 2e-05 | 1 of 3 | 40.0 |" in shown
    assert "| b | 2e-05 | 0 of 3 |  |" in shown
    kept = {path: of for path, of in read_files(old.folder).items() if run.name not in path.parts}
    assert kept == files


def test_one_entry_is_listed_with_its_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = make_sweep(tmp_path, SCORES)
    options = ["--table", str(tmp_path / "t.yaml"), "--output", str(old.folder)]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *options, "--list", "--only", "1"])
    sweep_command.main()
    entry, *listed = capsys.readouterr().out.splitlines()
    assert entry == "1 b"
    runs = old.list_runs(old.list_cells()[1])
    assert [line.split() for line in listed] == [["done", run.name] for run in runs]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--slurm", "t.sbatch", "--launch", "srun"],
            "--launch: no effect with --slurm; leave out",
        ),
        (["--slurm", "t.sbatch", "--jobs", "2", "--only", "0"], "--jobs, --only: no effect with"),
        (["--slurm", "t.sbatch", "--list"], "--list: no effect with --slurm; leave out"),
        (["--list", "--jobs", "2"], "--jobs: no effect with --list; leave out"),
    ],
    ids=str,
)
def test_an_option_that_would_be_ignored_is_refused(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--table", "miniature", *options])
    with pytest.raises(UserError, match=f"^{message}"):
        sweep_command.main()
    assert not list(tmp_path.iterdir())


def test_effective_ranks_are_measured_once_the_first_run_has_finished(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, SCORES, spectra=True)
    finished, _, missing = sweep.list_cells()
    first_run = sweep.folder / sweep.list_eval_runs(finished)["recipe"][0].name
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
    for run in sweep.list_eval_runs(kept)["recipe"]:
        (sweep.kept / run.name).mkdir(parents=True)
        (sweep.folder / run.name / "results.json").rename(sweep.kept / run.name / "results.json")
    folder = sweep.folder / sweep.list_eval_runs(diverged)["recipe"][0].name
    folder.mkdir()
    (folder / "state.json").write_text('{"state": "diverged"}')
    assert [jobs.count_jobs(sweep, cell) for cell in (kept, diverged)] == [3, 3]
    assert len(jobs.list_jobs(sweep, kept)) == len(jobs.list_jobs(sweep, diverged)) == 3


# A launcher with a helper process. Each writes to the file `told` of the job's folder what it gets.
LAUNCHER = """\
#!/usr/bin/env bash
for name in USR1 TERM; do
    trap "echo $name >> '$1/told'; sleep 0.3; kill -KILL \\$(jobs -p); exit" "$name"
done
(
    for name in USR1 TERM; do
        trap "echo helper $name >> '$1/told'; exit" "$name"
    done
    touch "$1/started"
    for _ in {1..600}; do sleep 0.05; done
) &
wait
"""


@dataclass(frozen=True)
class StopOnceStarted:
    """Stands in for `jobs.Stop`: a stop is requested as soon as the job has started."""

    started: Path

    @property
    def requested(self) -> bool:
        return self.started.exists()


def make_launched_job(folder: Path, name: str) -> tuple[jobs.Job, list[str]]:
    """Write LAUNCHER under a name, and return a job for it and its command line."""
    launcher = folder / name
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    return jobs.Job("a", (str(folder),), folder / "results.json", folder / "log"), [str(launcher)]


def test_srun_is_told_to_stop_with_a_signal_that_it_forwards(tmp_path: Path) -> None:
    """At SIGTERM srun kills its ranks, so that nothing is saved; its helper is left alone."""
    job, launcher = make_launched_job(tmp_path, "srun")
    list(jobs.run_jobs(lambda: [job], 1, launcher, StopOnceStarted(tmp_path / "started")))
    assert (tmp_path / "told").read_text() == "USR1\n"


def test_other_launchers_are_told_to_stop_with_sigterm(tmp_path: Path) -> None:
    job, launcher = make_launched_job(tmp_path, "deepspeed")
    list(jobs.run_jobs(lambda: [job], 1, launcher, StopOnceStarted(tmp_path / "started")))
    assert "TERM" in (tmp_path / "told").read_text().splitlines()


def test_a_job_that_is_told_to_stop_lasts_as_long_as_its_ranks(tmp_path: Path) -> None:
    """On one machine `deepspeed` itself ends at SIGTERM at once."""
    launcher = tmp_path / "deepspeed"
    ranks = (
        "trap 'sleep 1; touch $1/saved; exit' TERM; touch $1/started; while sleep 0.05; do :; done"
    )
    launcher.write_text(f"#!/usr/bin/env bash\n({ranks}) &\nwait\n")
    launcher.chmod(0o755)
    job = jobs.Job("a", (str(tmp_path),), tmp_path / "results.json", tmp_path / "log")
    stop = StopOnceStarted(tmp_path / "started")
    assert [ended for ended, _ in jobs.run_jobs(lambda: [job], 1, [str(launcher)], stop)] == [job]
    assert (tmp_path / "saved").exists()


def test_a_zombie_is_no_process_that_a_stopped_job_waits_for() -> None:
    """In a container nobody may wait for the processes that a launcher leaves."""
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        assert jobs._has_processes(process.pid)
        process.kill()
        deadline = time.monotonic() + 10
        while jobs._has_processes(process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, 0)  # the zombie is still there
        assert not jobs._has_processes(process.pid)


def start_and_die(job: jobs.Job, launcher: list[str], started: Path) -> None:
    """Start a job, and end without a word to it."""
    jobs._start_job(job, 1, launcher)
    while not started.exists():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("name", "told"), [("srun", "USR1"), ("deepspeed", "TERM")])
def test_a_launcher_whose_sweep_is_gone_gets_the_same_signal(
    name: str, told: str, tmp_path: Path
) -> None:
    job, launcher = make_launched_job(tmp_path, name)
    sweep = multiprocessing.get_context("fork").Process(
        target=start_and_die, args=(job, launcher, tmp_path / "started")
    )
    sweep.start()
    sweep.join(timeout=20)
    assert sweep.exitcode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    heard = tmp_path / "told"
    while not (heard.exists() and heard.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert heard.read_text() == f"{told}\n"
