"""bench/gpu.py --tiny measures, resumes, and names a goal that is missed.

Runs three cheap parts of it in real processes on CPUs. About 20 s.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.processes import make_environment

PARTS = ("env", "rates", "dtypes")


def run_bench(output: Path, *options: str) -> subprocess.CompletedProcess:
    script = str(ROOT / "bench" / "gpu.py")
    line = [sys.executable, script, "--tiny", "--output", str(output), "--part", *PARTS, *options]
    return subprocess.run(line, env=make_environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.full
def test_parts_are_measured_once_and_missed_goals_are_named(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    done = run_bench(output)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "goals of speed are not judged" in done.stdout
    record = json.loads(output.read_text())
    assert list(record["parts"]) == list(PARTS)
    checks = [check for part in record["parts"].values() for check in part["checks"]]
    # Goals of speed are named, and only they are not judged on CPUs.
    unjudged = [check["check"] for check in checks if check["passed"] is None]
    assert unjudged == ["fp64 sums at 25 TFLOP/s", "an eigenproblem of 4,096 in 1.5 s"]
    assert all(check["passed"] for check in checks if check["check"] not in unjudged)
    assert record["parts"]["dtypes"]["figures"]["zero3"]["sums over ranks"] == ["torch.float32"]

    # What is in the file is not measured again: a goal that it says was missed stays so.
    record["parts"]["rates"]["checks"][0]["passed"] = False
    output.write_text(json.dumps(record))
    again = run_bench(output)
    assert again.returncode == 1
    assert "missed: rates: fp64 sums at 25 TFLOP/s: " in again.stdout
    assert json.loads(output.read_text()) == record

    # Without time nothing is measured, and nothing is lost.
    late = run_bench(output, "--again", "--minutes", "0")
    assert late.returncode == 1
    assert "not measured, no time left: env, rates, dtypes" in late.stdout
    assert json.loads(output.read_text()) == record
