"""Kill a sweep of tiny runs in the middle, or tell it to stop, and start it again.

Proves that a sweep stops its runs, resumes them, leaves finished ones alone, and that the report
has their row. Real processes, one rank a run; about 40 s.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

from tests.support.paths import ROOT
from tests.support.processes import Run, make_environment
from tests.support.runs import read_metrics, read_state

START_LIMIT = 240  # seconds until a run of the sweep has made its first steps
SWEEP = [sys.executable, str(ROOT / "launch" / "sweep.py")]
REPORT = [sys.executable, str(ROOT / "launch" / "report.py")]


def write_table(folder: Path, table: dict) -> list[str]:
    """Write a table, and return the options that name it and its folder of runs."""
    path = folder / "t.yaml"
    path.write_text(yaml.safe_dump(table, sort_keys=False))
    return ["--table", str(path), "--output", str(folder / "runs")]


def wait_for_run(folder: Path, pattern: str, num_steps: int) -> Path:
    """Return the first run whose name fits, once it has made `num_steps` steps."""
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline:
        for run in folder.glob(pattern):
            if len(read_metrics(run)) >= num_steps:
                return run
        time.sleep(0.02)
    raise TimeoutError(f"no run {pattern} has made {num_steps} steps")


def run_command(*words: str, limit: int) -> subprocess.CompletedProcess:
    """Run a command to its end, for at most `limit` seconds."""
    return subprocess.run(
        words, env=make_environment(), capture_output=True, text=True, timeout=limit
    )


def test_a_killed_sweep_resumes(
    start_run: Callable[..., Run], recipe: Path, tmp_path: Path
) -> None:
    table = {
        "recipe": str(recipe),
        "set": {
            "engine": "single",
            "train.max_steps": 40,
            "train.checkpoint_every": 2,
            "data.held_out": 7,
        },
        "seeds": [1, 2],
        "suites": [],
        "rows": {
            "lora": {"set": {"adapter.method": "lora"}},
            "broken": {"set": {"data.path": "/nowhere.jsonl"}},
        },
    }
    options = write_table(tmp_path, table)
    first = start_run([*SWEEP, *options, "--only", "0"], tmp_path / "log").launcher
    second = wait_for_run(tmp_path / "runs", "lora-*-seed2-*", 4)
    (child,) = psutil.Process(first.pid).children()
    first.kill()
    first.wait()
    child.wait(timeout=60)  # the run saves and ends when its sweep is gone
    (done,) = (tmp_path / "runs").glob("lora-*-seed1-*")
    finished = (done / "results.json").stat().st_mtime_ns
    assert read_state(second) == "preempted"
    assert not (second / "results.json").exists()

    again = run_command(*SWEEP, *options, limit=300)
    assert again.returncode == 1
    assert "1 runs of 4 are in" in again.stdout
    assert "resuming after step" in (tmp_path / "runs" / "logs" / f"{second.name}.log").read_text()
    assert len(read_metrics(second)) == 40
    seconds = json.loads((second / "results.json").read_text())["seconds"]
    assert seconds["total"] > seconds["training"] + seconds["calibration"]  # of both starts
    assert (done / "results.json").stat().st_mtime_ns == finished
    failures = [line for line in again.stderr.splitlines() if line.startswith("failed: broken-")]
    assert len(failures) == 2
    assert "exit code 2: error: data.path: no file or folder /nowhere.jsonl" in failures[0]

    report = run_command(*REPORT, *options, limit=120)
    assert report.returncode == 0, report.stderr[-2000:]
    assert "| lora | 0.02 | 2 |" in report.stdout
    assert "| broken | 0.02 | 0 of 2 |" in report.stdout


def test_a_sweep_that_is_told_to_stop_stops_its_runs(
    start_run: Callable[..., Run], recipe: Path, tmp_path: Path
) -> None:
    table = {
        "recipe": str(recipe),
        "set": {"engine": "single", "train.max_steps": 4000},
        "seeds": [1],
        "suites": [],
        "rows": {"a": {"set": {"adapter.method": "lora"}}},
    }
    options = write_table(tmp_path, table)
    sweep = start_run([*SWEEP, *options], tmp_path / "log").launcher
    run = wait_for_run(tmp_path / "runs", "a-*", 1)
    sweep.send_signal(signal.SIGTERM)
    assert sweep.wait(timeout=60) == 75
    assert read_state(run) == "preempted"
