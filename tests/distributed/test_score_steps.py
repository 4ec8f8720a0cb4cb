"""Score a model while it trains, keep its best step, and stop early.

Proves that the scores change no number of the training, dropout included; that what is exported is
the best step's checkpoint, whose measured loss is the one that was the best; that a run stops where
its scores say so; and that a run that is killed on the way, or after its early stop, ends as the
undisturbed one. One launch of one process with three small runs, and resumes; 20 s. Two ranks of
every engine are in `make test-full`.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from astra import adapter
from tests.support.runs import (
    copy_unfinished,
    read_generations,
    read_losses,
    read_metrics,
    read_results,
    read_steps,
    runs_are_equal,
)

pytestmark = pytest.mark.xdist_group("watch")

PLAIN = (
    "engine=single",
    "data.held_out=6",
    "adapter.dropout=0.1",
    "adapter.method=lora",
    "train.max_steps=12",
    "train.lr=0.15",
    "train.checkpoint_every=5",
    "eval.suites=[]",
)
EVERY = (*PLAIN, "eval.every=2", "eval.every_suites=[gsm8k]", "eval.every_limit=3")
# A random model solves no problem, so the first score is the best: the others are not above it.
BEST = (*EVERY, "train.keep_best=gsm8k")
PATIENT = (*BEST, "train.patience=2")
ALL = [PLAIN, BEST, PATIENT]


def read_scores(run: Path, name: str) -> dict[int, float]:
    """Return step -> first metric of a score."""
    found = {}
    for record in read_metrics(run):
        if "dev" in record:
            found[record["step"]] = next(iter(record["dev"][name].values()))
    return found


def find_best_step(run: Path) -> int:
    """Return the first step with the highest accuracy."""
    scores = read_scores(run, "gsm8k")
    return max(scores, key=scores.get)


def read_dev(run: Path) -> list[dict | None]:
    """Return the scores of every step."""
    return [record.get("dev") for record in read_metrics(run)]


def check_best(run: Path) -> None:
    """Check that a run has exported, measured and recorded its best step, which is not its last."""
    best, results = find_best_step(run), read_results(run)
    scores, losses = read_scores(run, "gsm8k"), read_scores(run, "other_text")
    last = max(scores)
    assert best < last == results["steps"] and results["exported_step"] == best
    of_best = results["while_training"]["gsm8k"]
    assert of_best["best"] == {"step": best, "value": scores[best]}
    assert of_best["last"] == {"step": last, "value": scores[last]}
    assert results["while_training"]["other_text"]["last"] == {"step": last, "value": losses[last]}
    assert results["other_text"]["after"]["loss"] == losses[best] != losses[last]
    assert f"step {best}, the best by gsm8k" in (run / "README.md").read_text()


def check_factors(run: Path) -> None:
    """Check that the exported factors are those of the best step's checkpoint."""
    saved = load_file(run / f"checkpoints/step-{find_best_step(run):07d}/tensors.safetensors")
    factors, _ = adapter.load_adapter(run / "adapter")
    for name, (a, b) in factors.items():
        assert torch.equal(a, saved[f"{name}.A.trained"])
        assert torch.equal(b, saved[f"{name}.B.trained"])


def test_scores_change_no_number_of_the_training(trained: Callable[..., Path]) -> None:
    plain, watched = trained(1, *PLAIN, along=ALL), trained(1, *BEST, along=ALL)
    assert read_steps(plain) == read_steps(watched) and len(read_steps(plain)) == 12
    assert sorted(read_scores(watched, "gsm8k")) == [2, 4, 6, 8, 10, 12]
    assert "while_training" not in read_results(plain)
    # The last scores are those after training, with the same rows and problems.
    last = read_metrics(watched)[-1]["dev"]
    assert last.keys() == {"held_out", "other_text", "gsm8k"}
    assert last["held_out"]["loss"] == read_results(plain)["held_out"]["after"]["loss"]
    assert last["other_text"]["loss"] == read_results(plain)["other_text"]["after"]["loss"]
    for step in (2, 12):
        assert len(read_generations(watched / "while_training" / f"step-{step:07d}")) == 3


def test_the_best_step_is_kept_and_exported(trained: Callable[..., Path]) -> None:
    run = trained(1, *BEST, along=ALL)
    check_best(run)
    check_factors(run)


def test_a_run_stops_when_its_patience_is_over(trained: Callable[..., Path]) -> None:
    whole, run = trained(1, *BEST, along=ALL), trained(1, *PATIENT, along=ALL)
    best, results = find_best_step(run), read_results(run)
    assert len(read_steps(run)) == best + 4 < 12  # two scores, two steps apart
    assert read_steps(run) == read_steps(whole)[: best + 4]
    assert (results["steps"], results["planned_steps"]) == (best + 4, 12)
    check_best(run)


@pytest.mark.parametrize("when", ["on the way", "after its early stop"])
def test_a_killed_run_resumes_with_its_best(
    when: str, launch: Callable, trained: Callable[..., Path], recipe: Path, tmp_path: Path
) -> None:
    whole = trained(1, *PATIENT, along=ALL)
    best, last = find_best_step(whole), read_results(whole)["steps"]
    after = best if when == "on the way" else last
    copy_unfinished(whole, tmp_path / "run", after)
    for part in ("lora", "while_training"):
        shutil.rmtree(tmp_path / "run" / part)
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps([[list(PATIENT), str(tmp_path / "run")]]))
    done = launch(Path("tests/distributed/workers/train.py"), recipe, cases)
    assert f"resuming after step {after} of 12" in done.stdout
    assert runs_are_equal(tmp_path / "run", whole)
    assert read_dev(tmp_path / "run") == read_dev(whole)
    if when == "on the way":  # the responses of earlier steps are not made again
        place = f"while_training/step-{last:07d}"
        assert read_generations(tmp_path / "run" / place) == read_generations(whole / place)
    changing = ("seconds", "conditions", "peak_memory")
    results = [read_results(run) for run in (tmp_path / "run", whole)]
    first, second = ({k: v for k, v in one.items() if k not in changing} for one in results)
    assert first == second


@pytest.mark.full
@pytest.mark.parametrize(
    ("engine", "dtype"), [("zero3", "float32"), ("fsdp", "bfloat16"), ("zero2", "bfloat16")]
)
def test_two_ranks_keep_the_same_best(
    engine: str, dtype: str, trained: Callable[..., Path]
) -> None:
    own = [f"engine={engine}", f"model.dtype={dtype}"]
    settings, plain = ([s for s in case if s != "engine=single"] + own for case in (BEST, PLAIN))
    run = trained(2, *settings, along=[plain, settings])
    assert read_steps(run) == read_steps(trained(2, *plain, along=[plain, settings]))
    check_best(run)
    check_factors(run)


@pytest.mark.full
def test_all_parameters_in_bf16_keep_their_best(trained: Callable[..., Path]) -> None:
    changed = ("adapter.method=lora", "adapter.dropout=0.1", "engine=single")
    settings = [value for value in BEST if value not in changed]
    settings += ["adapter.method=full", "engine=zero3", "model.dtype=bfloat16"]
    run = trained(2, *settings)
    assert len(read_losses(run)) == 12
    check_best(run)


@pytest.mark.full
def test_compiled_layers_are_scored_as_they_were_written(trained: Callable[..., Path]) -> None:
    settings, plain = ([*case, "train.compile=true"] for case in (BEST, PLAIN))
    run = trained(1, *settings, along=[plain, settings])
    assert read_steps(run) == read_steps(trained(1, *plain, along=[plain, settings]))
    check_best(run)
