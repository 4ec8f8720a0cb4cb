"""launch/evaluate.py in this process, on one rank: a server's sampling, and folders that are refused.

Needs nothing, and no server: its responses are made here. A few seconds.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from eval.generation.decoding import Completion
from eval.generation.server import SAMPLING
from launch import evaluate
from launch.run.folder import RECIPE
from launch.run.results import RESULTS, read_evaluation_results
from launch.runtime.distributed import stop_process_group
from launch.runtime.errors import UserError
from launch.scoring import evaluate_server
from launch.scoring.responses import GENERATIONS, PREVIOUS, SETTINGS

SERVER = ["--backend", "openai", "--url", "http://none/v1", "--model", "m", "--suite", "gsm8k"]


@pytest.fixture
def run_evaluate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that runs the command with some options."""

    def run(*options: object) -> None:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, options)])
        evaluate.main()

    yield run
    if dist.is_initialized():  # an error ended the command
        stop_process_group()


def respond(
    url: str, model: str, prompts: Sequence[str], **_: object
) -> Iterator[dict[int, Completion]]:
    """Stand for `request_completions`."""
    for index in range(len(prompts)):
        yield {index: Completion("The answer is: 2")}


def test_responses_whose_sampling_the_server_chose_are_set_aside(
    run_evaluate: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(evaluate_server, "request_completions", respond)
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    output = tmp_path / "scores"
    options = [*SERVER, "--data-dir", tmp_path, "--output", output]
    run_evaluate(*options)
    run_evaluate(*options)
    assert not (output / PREVIOUS).exists()
    results = read_evaluation_results(output)
    assert (results.sampling, results.scores["gsm8k"].accuracy) == (SAMPLING, 1)
    made_with = json.loads((output / SETTINGS).read_text())
    assert made_with.pop("sampling") == SAMPLING
    (output / SETTINGS).write_text(json.dumps(made_with))  # as an earlier version left it
    run_evaluate(*options)
    assert (output / PREVIOUS).is_file()


def test_the_results_of_a_run_are_not_replaced(
    run_evaluate: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(evaluate_server, "request_completions", respond)
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    run = tmp_path / "run"
    run.mkdir()
    for name in (RECIPE, RESULTS, GENERATIONS):
        (run / name).write_text(f"{name} of the run")
    with pytest.raises(UserError, match=r"^--output: \S+ holds a run; .* such as \S+/run/scores$"):
        run_evaluate(*SERVER, "--data-dir", tmp_path, "--output", run)
    left = {path.name: path.read_text() for path in run.iterdir()}
    assert left == {name: f"{name} of the run" for name in (RECIPE, RESULTS, GENERATIONS)}
