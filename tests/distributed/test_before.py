"""Give today's commands the folders that an earlier version left (tests/fixtures/before).

Proves that people's runs, calibrations, prepared tokens and scores survive a change of the code: an
interrupted run resumes to the numbers of the undisturbed one, and every other folder is taken as it
is. The commands start in a copy of the folder, as its paths are relative. One rank; about 20 s.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from astra.adapter import load_adapter
from tests.support.paths import FIXTURES
from tests.support.processes import make_set_options
from tests.support.runs import read_generations, read_losses, read_metrics, read_results, read_state

BEFORE = FIXTURES / "before"
# Another processor adds in another order. Limited to SSE4 or AVX2, an AVX-512 machine differed by
# 9e-8 in losses and gradient norms, and by 2e-7 of the largest weight.
TOLERANCE = 1e-6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Copy the old folders, to start commands there."""
    return Path(shutil.copytree(BEFORE, tmp_path / "before"))


def assert_tensors_close(found: Path, wanted: Path) -> None:
    """Compare two safetensors files, to the tolerance times each tensor's largest value."""
    tensors, others = load_file(found), load_file(wanted)
    assert tensors.keys() == others.keys()
    for key, value in others.items():
        atol = TOLERANCE * value.abs().max().item()
        torch.testing.assert_close(tensors[key], value, rtol=0, atol=atol, msg=key)


@pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="other math libraries draw other dropout masks"
)
def test_an_interrupted_run_resumes_to_the_old_numbers(launch: Callable, folder: Path) -> None:
    run = folder / "run"
    (run / "results.json").unlink()
    state = json.loads((run / "state.json").read_text())
    (run / "state.json").write_text(json.dumps(state | {"state": "preempted"}))
    done = launch("launch/train.py", "--recipe", "recipe.yaml", "--output", "run", folder=folder)
    assert "after step 3 of 6" in done.stdout

    found, wanted = read_metrics(run), read_metrics(BEFORE / "run")
    assert [step["step"] for step in found] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "lr", "tokens", "all_tokens"):
        values, others = ([step[key] for step in steps] for steps in (found, wanted))
        assert values == pytest.approx(others, rel=TOLERANCE), key
    # lora/ had the scale in its config, and now has it in B; A is as it was.
    (old, old_scale), (new, scale) = (
        load_adapter(folder / "lora") for folder in (BEFORE / "run", run)
    )
    assert (old_scale, scale) == (1.5, 1.0)
    for name, (a, b) in old.items():
        for found, wanted in ((new[name].a, a), (new[name].b, old_scale * b)):
            atol = TOLERANCE * wanted.abs().max().item()
            torch.testing.assert_close(found, wanted, rtol=0, atol=atol, msg=name)
    assert read_state(run) == "finished"
    results, others = read_results(run), read_results(BEFORE / "run")
    assert results.keys() == others.keys()
    for key in ("base", "data", "method", "variant", "rank", "lora_rank", "steps", "logit_drift"):
        assert results[key] == others[key], key


def test_a_finished_run_is_left_alone(launch: Callable, folder: Path) -> None:
    done = launch("launch/train.py", "--recipe", "recipe.yaml", "--output", "run", folder=folder)
    assert "finished" in done.stdout
    assert read_results(folder / "run") == read_results(BEFORE / "run")


def test_an_old_calibration_is_taken(launch: Callable, folder: Path) -> None:
    options = make_set_options(["calibration.path=calibration", "train.max_steps=1"])
    line = ["--recipe", "recipe.yaml", *options, "--output", "new"]
    done = launch("launch/train.py", *line, folder=folder)
    assert "calibration: taken from calibration" in done.stdout
    assert not list((folder / "new" / "calibration").glob("window-*"))
    initial = Path("checkpoints", "step-0000000", "tensors.safetensors")
    assert_tensors_close(folder / "new" / initial, BEFORE / "run" / initial)


def test_old_prepared_tokens_are_taken(launch: Callable, folder: Path) -> None:
    (folder / "train.jsonl").unlink()  # the tokens alone are enough
    settings = ["data.prepared=prepared", "calibration.path=calibration", "train.max_steps=2"]
    line = ["--recipe", "recipe.yaml", *make_set_options(settings), "--output", "new"]
    launch("launch/train.py", *line, folder=folder)
    found, old = read_results(folder / "new"), read_results(BEFORE / "run")
    assert found["data"]["tokens_sha256"] == old["data"]["tokens_sha256"]
    assert len(read_losses(folder / "new")) == 2


def test_old_prepared_tokens_are_checked_and_kept(launch: Callable, folder: Path) -> None:
    manifest = json.loads((folder / "prepared" / "manifest.json").read_text())
    # The rows count as unchanged by size and time, and a checkout sets the time.
    _, changed = manifest["made_from"]["source"]["files"]["train.jsonl"]
    os.utime(folder / "train.jsonl", ns=(changed, changed))
    done = launch(
        "launch/prepare.py", "--recipe", "recipe.yaml", "--output", "prepared", folder=folder
    )
    assert manifest["tokens_sha256"] in done.stdout
    assert json.loads((folder / "prepared" / "manifest.json").read_text()) == manifest
    for name in ("tokens.bin", "offsets.bin", "answer_starts.bin"):
        old = (BEFORE / "prepared" / name).read_bytes()
        assert (folder / "prepared" / name).read_bytes() == old


def test_an_old_run_is_reported(launch: Callable, folder: Path) -> None:
    done = launch("launch/report.py", "run", folder=folder)
    assert done.stdout == (BEFORE / "printed" / "report.txt").read_text()


def test_old_responses_are_compared_and_graded_alike(launch: Callable, folder: Path) -> None:
    done = launch("launch/evaluate.py", "--compare", "scores/first", "scores/second", folder=folder)
    assert done.stdout == (BEFORE / "printed" / "compare.txt").read_text()
    line = ["--grade", "scores/second/generations.jsonl", "--data-dir", "gsm8k"]
    done = launch("launch/evaluate.py", *line, folder=folder)
    assert done.stdout == (BEFORE / "printed" / "grade.txt").read_text()
    graded = (folder / "scores" / "second" / "graded.jsonl").read_text()
    assert graded == (BEFORE / "scores" / "second" / "generations.jsonl").read_text()


def test_an_old_evaluation_resumes(launch: Callable, folder: Path) -> None:
    scores = folder / "scores" / "lora"
    path = scores / "generations.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    (scores / "results.json").unlink()
    options = ["--model", "base", "--adapter", "run/lora", "--suite", "gsm8k"]
    line = [*options, "--data-dir", "gsm8k", "--max-new-tokens", 12, "--output", "scores/lora"]
    launch("launch/evaluate.py", *line, folder=folder)
    assert not (scores / "generations.previous.jsonl").exists()
    old = BEFORE / "scores" / "lora"
    assert read_generations(scores)[:2] == read_generations(old)[:2]
    assert [row["id"] for row in read_generations(scores)] == ["gsm8k/0", "gsm8k/1", "gsm8k/2"]
    found, wanted = (read_results(run)["scores"]["gsm8k"] for run in (scores, old))
    # Only responses of now say that they were cut off.
    assert found.keys() - {"truncated"} == wanted.keys()
    assert (found["n"], found["data_sha256"]) == (wanted["n"], wanted["data_sha256"])
