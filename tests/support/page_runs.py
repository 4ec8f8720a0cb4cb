"""Make run folders for pages, from the run that the fixtures hold; nothing is trained."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.support.paths import ROOT

RUN = ROOT / "tests" / "fixtures" / "before" / "run"
SCORES = ROOT / "tests" / "fixtures" / "before" / "scores" / "first"
NUM_RESPONSES = 60


def make_run(folder: Path, outputs: Sequence[str] = ()) -> Path:
    """Copy a finished run with spectra, scores and graded responses to `folder`, and return it.

    Args:
        outputs: the texts of the first responses, in the place of their own.
    """
    shutil.copytree(RUN, folder, ignore=shutil.ignore_patterns("checkpoints"))
    results = json.loads((folder / "results.json").read_text())
    results["scores"] = json.loads((SCORES / "results.json").read_text())["scores"]
    (folder / "results.json").write_text(json.dumps(results))
    graded = (SCORES / "generations.jsonl").read_text().splitlines()
    rows = []
    for i in range(NUM_RESPONSES):
        rows.append(json.loads(graded[i % len(graded)]) | {"id": f"gsm8k/{i}"})
    for row, output in zip(rows, outputs, strict=False):
        row["output"] = output
    write_lines(folder / "generations.jsonl", rows)
    return folder


def make_running(folder: Path) -> Path:
    """Copy the run as it is during its fourth step, whose line is half written."""
    make_run(folder)
    (folder / "results.json").unlink()
    lines = (RUN / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:40])
    (folder / "state.json").write_text(json.dumps({"state": "running"}))
    rows = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    kept = ("suite", "id", "sample", "output")
    write_lines(folder / "generations.jsonl", [{key: row[key] for key in kept} for row in rows])
    with (folder / "generations.jsonl").open("a") as file:
        file.write('{"suite": "gsm')
    return folder


def write_lines(path: Path, rows: Sequence[dict]) -> None:
    """Write a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
