"""launch/evaluate.py in real processes: every benchmark is scored, and a killed evaluation resumes.

Also: the world size changes no response, responses of other settings are set aside, every node has
its own disk, and stored responses are graded and compared without a model. Needs the shared data
and the stories260K model; about two minutes.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.paths import ROOT, WORKERS
from tests.support.processes import Run, make_command
from tests.support.runs import read_generations, read_results

pytestmark = pytest.mark.xdist_group("evaluate")

BENCHMARKS = ["gsm8k", "math500", "humaneval", "mbpp", "commonsense"]
NUM_BENCHMARKS = 12  # with the eight of commonsense
LIMIT = 20  # problems of each
COMMIT = "a" * 40  # the hub's cache names a model's folder by its commit


@pytest.fixture(scope="module")
def options(shared: Path, benchmark_data: Path) -> list[object]:
    """Options that score 20 problems of every benchmark, with short responses."""
    options = ["--model", shared / "models" / "stories260K", "--data-dir", benchmark_data]
    for name in BENCHMARKS:
        options += ["--suite", name]
    return [*options, "--limit", LIMIT, "--max-new-tokens", 48]


@pytest.fixture(scope="module")
def whole(
    launch: Callable, options: list[object], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of an evaluation that nothing disturbed, on one rank."""
    folder = tmp_path_factory.mktemp("scores") / "whole"
    launch("launch/evaluate.py", *options, "--output", folder)
    return folder


def read_responses(folder: Path) -> dict[tuple, str]:
    """Return the responses of a finished evaluation by benchmark, problem and sample."""
    rows = read_generations(folder)
    responses = {(row["suite"], row["id"], row["sample"]): row["output"] for row in rows}
    assert len(responses) == len(rows)
    return responses


def read_responses_so_far(folder: Path) -> dict[tuple, str]:
    """Return the responses of an evaluation under way, whose last line may be half written."""
    responses = {}
    for line in (folder / "generations.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        responses[row["suite"], row["id"], row["sample"]] = row["output"]
    return responses


def test_every_benchmark_is_scored(whole: Path) -> None:
    scores = read_results(whole)["scores"]
    assert len(scores) == NUM_BENCHMARKS
    for name, score in scores.items():
        assert (score["n"], score["samples"], score["grader"]) == (LIMIT, 1, "strict"), name
        assert score["interval"][0] <= score["accuracy"] <= score["interval"][1]
        assert score["literature"]["n"] == LIMIT
        assert len(score["data_sha256"]) == 64
    assert sum(scores["humaneval"]["isolation"].values()) == LIMIT
    assert "| mean of the eight |" in (whole / "results.md").read_text()
    assert len(read_responses(whole)) == NUM_BENCHMARKS * LIMIT


def test_killed_in_the_middle_it_resumes_with_what_is_missing(
    launch: Callable,
    start_run: Callable[..., Run],
    whole: Path,
    options: list[object],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "scores"
    line = [*options, "--batch-size", 3, "--output", folder]
    command = make_command("torchrun", 2, *line, script=ROOT / "launch" / "evaluate.py")
    run = start_run(command, tmp_path / "log")
    path = folder / "generations.jsonl"
    run.wait_for(lambda: path.is_file() and len(read_responses_so_far(folder)) >= 45)
    for process in run.list_processes():
        os.kill(process.pid, signal.SIGKILL)
    run.wait()
    before = read_responses_so_far(folder)
    assert 45 <= len(before) < NUM_BENCHMARKS * LIMIT
    launch("launch/evaluate.py", *line, ranks=2)
    resumed, expected = read_responses(folder), read_responses(whole)
    assert {key: resumed[key] for key in before} == before
    assert resumed.keys() == expected.keys()
    # Other batches, and twice the ranks: only near ties between two tokens may fall the other way.
    assert sum(resumed[key] != expected[key] for key in expected) <= 2


def test_other_settings_set_the_old_responses_aside(
    launch: Callable, shared: Path, tmp_path: Path
) -> None:
    common = ["--model", shared / "models" / "stories260K", "--data-dir", shared / "data"]
    common += ["--suite", "boolq", "--limit", 4, "--max-new-tokens", 8, "--output", tmp_path]
    launch("launch/evaluate.py", *common)
    first = read_responses(tmp_path)
    sampled = ["--samples", 2, "--temperature", 0.7, "--prompt", "literature"]
    done = launch("launch/evaluate.py", *common, *sampled)
    assert "is generations.previous.jsonl now" in done.stdout
    assert len(read_responses(tmp_path)) == 8
    previous = (tmp_path / "generations.previous.jsonl").read_text().splitlines()
    assert len(previous) == len(first)
    score = read_results(tmp_path)["scores"]["boolq"]
    assert (score["samples"], score["n"], score["pass_at"].keys()) == (2, 4, {"1"})


def test_each_node_takes_the_model_from_its_own_disk(
    launch: Callable, base: Path, data: Path, tmp_path: Path
) -> None:
    for node in ("0", "1"):
        model = tmp_path / node / "models--some--base"
        shutil.copytree(base, model / "snapshots" / COMMIT)
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text(COMMIT)
    line = [tmp_path, "--model", "some/base", "--data-dir", data, "--suite", "gsm8k"]
    line += ["--max-new-tokens", 4, "--stall", 60, "--output", tmp_path / "scores"]
    launch(WORKERS / "node.py", *line, ranks=2)
    assert read_results(tmp_path / "scores")["scores"]["gsm8k"]["n"] == 7
    snapshot = tmp_path / "1" / "models--some--base" / "snapshots" / COMMIT
    with (snapshot / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"0")
    refused = launch(WORKERS / "node.py", *line, ranks=2, check=False)
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
