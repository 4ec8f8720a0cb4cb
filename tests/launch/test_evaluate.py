"""launch/evaluate.py in this process, on one rank: what is recorded, and folders that are refused.

Needs nothing, and no server: its responses are made here. A few seconds.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from eval.generation.decoding import Completion
from eval.generation.server import SAMPLING
from launch import evaluate
from launch.config.schema import Eval
from launch.run.folder import RECIPE
from launch.run.results import RESULTS, read_evaluation_results
from launch.runtime import locks
from launch.runtime.distributed import stop_process_group
from launch.runtime.errors import UserError
from launch.scoring import evaluate_server
from launch.scoring.responses import GENERATIONS, PREVIOUS, SETTINGS
from tests.support.hub import COMMIT, serve_hub
from tests.support.paths import ROOT

BASE = ROOT / "tests" / "fixtures" / "before" / "base"
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


def test_results_have_the_commit_of_a_model_from_the_hub(
    run_evaluate: Callable[..., None], tmp_path: Path
) -> None:
    shutil.copytree(BASE, tmp_path / "remote" / "models" / "someone" / "model")
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    options = ["--data-dir", tmp_path, "--max-new-tokens", 1, "--output", tmp_path / "scores"]
    with serve_hub(tmp_path / "remote", tmp_path / "hub"):
        run_evaluate("--model", "someone/model", *options)
    base = read_evaluation_results(tmp_path / "scores").base
    assert (base.name, base.revision, base.revision_verified) == ("someone/model", COMMIT, True)
    made_with = json.loads((tmp_path / "scores" / SETTINGS).read_text())
    assert "revision" not in made_with["base"]  # the responses are another commit's too


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*SERVER, "--adapter", "run/lora"], r"^--adapter: a server holds its own adapters; give"),
        ([*SERVER, "--dtype", "float32", "--batch-size", 2], "^--batch-size, --dtype: no effect"),
        ([*SERVER, "--engine", "fsdp"], "^--engine: no effect with --backend openai; leave out"),
        ([*SERVER, "--revision", "v1"], "^--revision: no effect with --backend openai"),
        (["--model", "m", "--url", "http://none/v1"], "^--url: no effect with --backend transf"),
        (["--grade", "f", "--suite", "gsm8k", "--limit", 5], "^--limit, --suite: no effect with"),
        (["--grade", "f", "--model", "m", "--local_rank", 0], "^--model: no effect with --grade"),
        (["--compare", "a", "b", "--output", "c"], "^--output: no effect with --compare"),
        (["--compare", "a", "b", "--grade", "f"], "^--grade: no effect with --compare"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    options: list[object], message: str, run_evaluate: Callable[..., None], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run_evaluate(*options)


def test_a_server_is_not_asked_by_several_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(evaluate_server.dist, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match=r"^--backend openai: each of 2 ranks would send every"):
        evaluate_server.evaluate_server("http://none/v1", "m", 1, {}, Eval(), tmp_path)


def test_results_name_the_suites_that_they_leave_out(
    run_evaluate: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(evaluate_server, "request_completions", respond)
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    problem = {"problem": "1 + 1?", "answer": "2", "solution": "", "subject": "", "level": 1}
    (tmp_path / "math500_test.jsonl").write_text(json.dumps(problem) + "\n")
    options = [*SERVER, "--data-dir", tmp_path, "--output", tmp_path / "scores"]
    run_evaluate(*options)
    assert "leaves out" not in capsys.readouterr().out
    run_evaluate(*[*options[:-5], "math500", *options[-4:]])
    assert "results.json leaves out gsm8k: generations.jsonl has" in capsys.readouterr().out
    assert list(read_evaluation_results(tmp_path / "scores").scores) == ["math500"]


def test_two_evaluations_do_not_share_a_folder(
    run_evaluate: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(locks, "WAIT", -1.0)
    lock = locks.FolderLock(tmp_path)
    lock.acquire()
    with pytest.raises(UserError, match=r"^--output: \S+ is in use by host"):
        run_evaluate(*SERVER, "--data-dir", tmp_path, "--output", tmp_path)
    del lock
