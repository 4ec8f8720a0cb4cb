"""A sweep of two tiny runs, killed in the middle: the same command goes on, and the report has the row."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

from bench.faults import Run

ROOT = Path(__file__).resolve().parents[2]


def test_killed_in_the_middle_it_goes_on(
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
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    options = ["--table", str(tmp_path / "t.yaml"), "--output", str(tmp_path / "runs")]
    line = [sys.executable, str(ROOT / "launch" / "sweep.py"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    first = start_run([*line, "--only", "0"], tmp_path / "log").launcher
    second = wait_for(
        lambda: [run for run in (tmp_path / "runs").glob("lora-*-seed2-*") if steps(run) >= 4]
    )[0]
    (child,) = psutil.Process(first.pid).children()
    first.kill()
    first.wait()
    child.wait(timeout=60)  # the run saves and ends when its sweep is gone
    (done,) = (tmp_path / "runs").glob("lora-*-seed1-*")
    finished = (done / "results.json").stat().st_mtime_ns
    assert json.loads((second / "state.json").read_text())["state"] == "preempted"
    assert not (second / "results.json").exists()

    again = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 1
    assert "1 runs of 4 are in" in again.stdout
    assert "going on after step" in (tmp_path / "runs" / "logs" / f"{second.name}.log").read_text()
    assert steps(second) == 40
    assert (second / "results.json").is_file()
    assert (done / "results.json").stat().st_mtime_ns == finished
    failures = [line for line in again.stderr.splitlines() if line.startswith("failed: broken-")]
    assert len(failures) == 2
    assert "exit code 2: error: data.path: no file or folder /nowhere.jsonl" in failures[0]

    report = [sys.executable, str(ROOT / "launch" / "report.py"), *options]
    shown = subprocess.run(
        report, env=environment, capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert "| lora | 0.02 | 2 |" in shown
    assert "| broken | 0.02 | 0 of 2 |" in shown


def test_told_to_stop_it_tells_its_runs_and_says_so(
    start_run: Callable[..., Run], recipe: Path, tmp_path: Path
) -> None:
    table = {
        "recipe": str(recipe),
        "set": {"engine": "single", "train.max_steps": 4000},
        "seeds": [1],
        "suites": [],
    }
    (tmp_path / "t.yaml").write_text(
        yaml.safe_dump(table | {"rows": {"a": {"set": {"adapter.method": "lora"}}}})
    )
    options = ["--table", str(tmp_path / "t.yaml"), "--output", str(tmp_path / "runs")]
    line = [sys.executable, str(ROOT / "launch" / "sweep.py"), *options]
    sweep = start_run(line, tmp_path / "log").launcher
    (run,) = wait_for(lambda: [run for run in (tmp_path / "runs").glob("a-*") if steps(run) >= 1])
    sweep.send_signal(signal.SIGTERM)
    assert sweep.wait(timeout=60) == 75
    assert json.loads((run / "state.json").read_text())["state"] == "preempted"


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def wait_for(found):  # noqa: ANN001, ANN201
    """What `found` gives, once that is not empty."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if result := found():
            return result
        time.sleep(0.02)
    raise TimeoutError
