"""Run the quickstart as a newcomer does: it pretrains its base, trains under ZeRO-3, and learns.

Starts `deepspeed` with two ranks and an empty cache, and needs no network. About 2 minutes alone on
2 cores, 4 beside another test process.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.html_pages import read_page
from tests.support.runs import read_results

TIME_LIMIT = 8 * 60  # seconds


def test_quickstart_raises_exact_match_by_30_points_within_8_minutes(
    launch: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "ASTRA_CACHE", str(tmp_path / "cache"))
    start = time.monotonic()
    line = ["--recipe", "quickstart", "--output", tmp_path / "run"]
    done = launch("launch/train.py", *line, ranks=2, launcher="deepspeed")
    assert time.monotonic() - start < TIME_LIMIT
    results = read_results(tmp_path / "run")
    before, after = results["baseline"]["gsm8k"], results["scores"]["gsm8k"]
    assert before["n"] == after["n"] == 200
    assert after["accuracy"] - before["accuracy"] >= 0.30
    conditions = (results["method"], results["eigen_select"], results["engine"])
    assert conditions == ("astra", "smallest", "zero3")
    assert "| run | astra smallest | 8 | 0.005 | 42 | 200 |" in done.stdout
    # The run names what to do next. The page of it has its score.
    assert f"python launch/evaluate.py --compare {tmp_path / 'run'}/baseline" in done.stdout
    launch("launch/report.py", tmp_path / "run", "--html", tmp_path / "page.html")
    row = read_page(tmp_path / "page.html").read_table(0)["run"]
    assert float(row["gsm8k after"][1]) == after["accuracy"]
    manifest = json.loads(next((tmp_path / "cache").glob("quickstart-*/manifest.json")).read_text())
    assert 1_000_000 <= manifest["parameters"] <= 3_000_000
