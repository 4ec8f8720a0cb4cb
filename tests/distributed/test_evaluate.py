"""launch/evaluate.py in real processes: all suites, a kill in the middle, other world sizes, grades without a model."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.faults import Run, command

pytestmark = pytest.mark.xdist_group("evaluate")

ROOT = Path(__file__).resolve().parents[2]
SUITES = ["gsm8k", "math500", "humaneval", "mbpp", "commonsense"]


@pytest.fixture(scope="module")
def options(shared: Path) -> list[object]:
    suites = [word for suite in SUITES for word in ("--suite", suite)]
    model = shared / "models" / "stories260K"
    return [
        "--model",
        model,
        "--data-dir",
        shared / "data",
        *suites,
        "--limit",
        20,
        "--max-new-tokens",
        48,
    ]


@pytest.fixture(scope="module")
def whole(
    launch: Callable, options: list[object], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("scores") / "whole"
    launch("launch/evaluate.py", *options, "--output", folder)
    return folder


def generations(folder: Path) -> dict[tuple, str]:
    rows = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    found = {(row["suite"], row["id"], row["sample"]): row["output"] for row in rows}
    assert len(found) == len(rows)
    return found


def test_every_suite_is_scored(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    scores = results["scores"]
    assert len(scores) == 12
    for name, score in scores.items():
        assert (score["n"], score["samples"], score["grader"]) == (20, 1, "strict"), name
        assert score["interval"][0] <= score["accuracy"] <= score["interval"][1]
        assert score["literature"]["n"] == 20
        assert len(score["data_sha256"]) == 64
    assert sum(scores["humaneval"]["isolation"].values()) == 20
    assert "| mean of the eight |" in (whole / "results.md").read_text()
    assert len(generations(whole)) == 12 * 20


def test_killed_in_the_middle_it_goes_on_with_what_is_missing(
    launch: Callable,
    start_run: Callable[..., Run],
    whole: Path,
    options: list[object],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "scores"
    line = [*options, "--batch-size", 3, "--output", folder]
    run = start_run(
        command("torchrun", 2, *line, script=ROOT / "launch" / "evaluate.py"), tmp_path / "log"
    )
    run.wait_for(
        lambda: (folder / "generations.jsonl").is_file() and len(generations_so_far(folder)) >= 45
    )
    for process in run.processes():
        os.kill(process.pid, signal.SIGKILL)
    run.wait()
    before = generations_so_far(folder)
    assert 45 <= len(before) < 240
    launch("launch/evaluate.py", *line, ranks=2)
    found, wanted = generations(folder), generations(whole)
    assert {key: found[key] for key in before} == before
    assert found.keys() == wanted.keys()
    # Other batches, and twice the ranks: only near ties between two tokens may fall the other way.
    assert sum(found[key] != wanted[key] for key in wanted) <= 2


def generations_so_far(folder: Path) -> dict[tuple, str]:
    found = {}
    for line in (folder / "generations.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the last one may be half written
            continue
        found[row["suite"], row["id"], row["sample"]] = row["output"]
    return found


def test_other_settings_set_the_old_responses_aside(
    launch: Callable, shared: Path, tmp_path: Path
) -> None:
    common = [
        "--model",
        shared / "models" / "stories260K",
        "--data-dir",
        shared / "data",
        "--suite",
        "boolq",
    ]
    common += ["--limit", 4, "--max-new-tokens", 8, "--output", tmp_path]
    launch("launch/evaluate.py", *common)
    first = generations(tmp_path)
    sampled = ["--samples", 2, "--temperature", 0.7, "--prompt", "literature"]
    done = launch("launch/evaluate.py", *common, *sampled)
    assert "is generations.previous.jsonl now" in done.stdout
    assert len(generations(tmp_path)) == 8
    previous = (tmp_path / "generations.previous.jsonl").read_text().splitlines()
    assert len(previous) == len(first)
    scores = json.loads((tmp_path / "results.json").read_text())["scores"]["boolq"]
    assert (scores["samples"], scores["n"], scores["pass_at"].keys()) == (2, 4, {"1"})


def test_each_node_takes_the_model_from_its_own_disk(
    launch: Callable, base: Path, data: Path, tmp_path: Path
) -> None:
    for node in ("0", "1"):
        model = tmp_path / node / "models--some--base"
        shutil.copytree(base, model / "snapshots" / ("a" * 40))
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text("a" * 40)
    line = [
        tmp_path,
        "--model",
        "some/base",
        "--data-dir",
        data,
        "--suite",
        "gsm8k",
        "--max-new-tokens",
        4,
    ]
    line += ["--stall", 60, "--output", tmp_path / "scores"]
    launch("tests/distributed/workers/node.py", *line, ranks=2)
    assert (
        json.loads((tmp_path / "scores" / "results.json").read_text())["scores"]["gsm8k"]["n"] == 7
    )
    with (
        tmp_path / "1" / "models--some--base" / "snapshots" / ("a" * 40) / "model.safetensors"
    ).open("ab") as file:
        file.write(b"0")
    refused = launch("tests/distributed/workers/node.py", *line, ranks=2, check=False)
    assert refused.returncode == 2
    assert "error: --model: the weights of some/base differ between the nodes" in refused.stderr


def test_grading_again_and_comparing_need_no_model(
    launch: Callable, whole: Path, shared: Path, tmp_path: Path
) -> None:
    rows = [
        {"suite": "gsm8k", "output": "The answer is: 18", "reference": "18"},
        {"suite": "gsm8k", "output": "The answer is: 18.4", "reference": "18"},
        {"suite": "siqa", "output": "the correct answer is answer2", "reference": "answer2"},
        {
            "suite": "mbpp",
            "id": "mbpp/17",
            "output": "```python\ndef square_perimeter(a):\n    return 4 * a\n```",
        },
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = launch("launch/evaluate.py", "--grade", path, "--data-dir", shared / "data")
    assert "| gsm8k | 50.0 | 9.5 to 90.5 | 100.0 | 2 |" in done.stdout
    graded = [json.loads(line) for line in (tmp_path / "graded.jsonl").read_text().splitlines()]
    assert [row["strict"] for row in graded] == [True, False, True, True]
    assert [row["literature"] for row in graded] == [True, True, True, True]
    path.write_text(json.dumps(rows[0]) + "\n{not json\n")  # a row is never silently left out
    refused = launch("launch/evaluate.py", "--grade", path, check=False)
    assert (refused.returncode, f"line 2 of {path} is not JSON" in refused.stderr) == (2, True)
    done = launch("launch/evaluate.py", "--compare", whole, whole)
    assert "| mbpp | 0.0 | 0.0 | +0.0 |" in done.stdout
    refused = launch("launch/evaluate.py", "--compare", whole, tmp_path, check=False)
    assert refused.returncode == 2
    assert "has no generations.jsonl" in refused.stderr
