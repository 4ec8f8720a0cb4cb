"""Run `make miniature` with a stand-in for Python.

Proves that it reports whatever runs there are, and ends as the sweep did. Less than a second.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("sweep", "report", "ended"), [(0, 0, None), (1, 0, 1), (75, 0, 75), (0, 3, 3)]
)
def test_miniature_reports_and_ends_as_the_sweep_did(
    sweep: int, report: int, ended: int | None, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/sh\necho "$@" >> log\ncase $1 in */sweep.py) exit {sweep};; *) exit {report};; esac\n'
    )
    python.chmod(0o755)
    (tmp_path / ".venv" / "installed").touch()  # set up already
    line = ["make", "miniature", "TABLE=t", "OPTIONS=--set a=b"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / "log").read_text().splitlines() == [
        "launch/sweep.py --table t --jobs 2 --set a=b",
        "launch/report.py --table t --set a=b --write runs/tables/t-report --figures runs/tables/t-report",
    ]
    assert (done.returncode == 0) is (ended is None)
    assert ended is None or f"Error {ended}\n" in done.stderr
