"""Train new heads on BERT, RoBERTa, DeBERTa-v2 and Llama, under every kind of engine.

Proves that losses and predictions are those of plain transformers and PEFT from the same factors
and head, which compute whole steps at once and predict each row alone, so that neither micro batch,
padding nor world size counts; that plain PEFT loads the exported adapter with its head and predicts
the same; and that a run that resumes ends alike. About 20 s, and 100 s more with the full tests.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from scipy import stats

from eval.task_scores import score_intervals
from tests.support.classifiers import (
    LABELS,
    TARGETS,
    load_plain_base,
    load_recipe,
    make_plain_model,
    make_recipe,
    make_rows,
    predict_plainly,
    read_predictions,
    train_classifier,
)
from tests.support.paths import WORKERS
from tests.support.runs import copy_unfinished, read_losses, read_metrics, read_results

pytestmark = pytest.mark.xdist_group("tasks")

KINDS = [*TARGETS, "regression"]
NEW_MODULES = {"deberta": ["pooler", "classifier"], "llama": ["score"]}
SHARDED = {"zero3": 2, "fsdp": 2}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the recipe of each kind of base, and of a regression on BERT."""
    folder = tmp_path_factory.mktemp("recipes")
    made = {kind: make_recipe(folder / kind, kind) for kind in TARGETS}
    return made | {"regression": make_recipe(folder / "regression", "bert", regression=True)}


@pytest.fixture(scope="module")
def run_all(
    launch: Callable, recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Path]]:
    """Run all recipes with one engine in one launch; return their folders by kind."""
    done: dict[str, dict[str, Path]] = {}

    def run(engine: str, ranks: int = 1, *settings: str) -> dict[str, Path]:
        if engine not in done:
            output = tmp_path_factory.mktemp(engine)
            words: list[object] = []
            for kind in KINDS:
                words += ["--"] if words else []
                words += [recipes[kind], f"engine={engine}", *settings]
            launch(WORKERS / "tasks.py", output, *words, ranks=ranks)
            done[engine] = {kind: output / str(i) for i, kind in enumerate(KINDS)}
        return done[engine]

    return run


def compare_with_plain(run: Path, recipe_path: Path, kind: str, tolerance: float) -> None:
    """Compare losses, kept predictions, scores and the exported adapter with plain PEFT's."""
    recipe = load_recipe(recipe_path)
    regression = kind == "regression"
    plain = make_plain_model(run, recipe, list(NEW_MODULES.get(kind, ["classifier"])))
    losses = train_classifier(plain, recipe, make_rows(60, 1, regression))
    assert read_losses(run) == pytest.approx(losses, abs=tolerance, rel=0)
    assert len({round(loss, 3) for loss in losses}) > 10  # something is learnt
    rows = make_rows(21, 2, regression)
    kept = read_predictions(run)
    outputs = torch.tensor([row["outputs"] for row in kept], dtype=torch.float64)
    torch.testing.assert_close(
        outputs, predict_plainly(plain, recipe, rows), rtol=0, atol=10 * tolerance
    )
    assert [row["label"] for row in kept] == [row["label"] for row in rows]
    exported = PeftModel.from_pretrained(load_plain_base(recipe), str(run / "lora"))
    torch.testing.assert_close(
        outputs, predict_plainly(exported, recipe, rows), rtol=0, atol=10 * tolerance
    )
    predictions, labels = ([row[key] for row in kept] for key in ("prediction", "label"))
    if regression:
        assert predictions == outputs[:, 0].tolist()
        expected = {
            "pearson": stats.pearsonr(predictions, labels).statistic,
            "spearman": stats.spearmanr(predictions, labels).statistic,
        }
    else:
        assert predictions == [LABELS[i] for i in outputs.argmax(1)]
        right = sum(row["prediction"] == row["label"] for row in kept)
        expected = {"accuracy": right / len(rows)}
        predictions, labels = (list(map(LABELS.index, names)) for names in (predictions, labels))
    task, metric = recipe.task.kind, next(iter(expected))
    score = read_results(run)["scores"][task]
    assert (score["metric"], score["n"]) == (metric, len(rows))
    assert score["last"]["values"] == pytest.approx(expected)
    intervals = score_intervals(task, predictions, labels, kind=task)
    assert score["last"]["intervals"] == {name: list(ends) for name, ends in intervals.items()}
    assert score["last"]["step"] == 20 and len(score["epochs"]) == 2
    best = max(epoch["values"][metric] for epoch in score["epochs"])
    assert score["best"]["values"][metric] == best


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_trains_as_plain_peft_does(
    kind: str, run_all: Callable, recipes: dict[str, Path]
) -> None:
    compare_with_plain(run_all("single")[kind], recipes[kind], kind, 1e-5)


@pytest.mark.full
@pytest.mark.parametrize("engine", SHARDED)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_as_plain_peft_does(
    engine: str, kind: str, run_all: Callable, recipes: dict[str, Path]
) -> None:
    compare_with_plain(run_all(engine, SHARDED[engine])[kind], recipes[kind], kind, 1e-4)


def test_a_run_resumes_with_the_scores_of_earlier_epochs(
    launch: Callable, run_all: Callable, recipes: dict[str, Path], tmp_path: Path
) -> None:
    whole = run_all("single")["deberta"]
    copy_unfinished(whole, tmp_path / "0", 14)
    launch(WORKERS / "tasks.py", tmp_path, recipes["deberta"])
    assert read_losses(tmp_path / "0") == read_losses(whole)
    assert read_results(tmp_path / "0")["scores"] == read_results(whole)["scores"]
    assert [m["dev"] for m in read_metrics(whole) if "dev" in m]
    for part in ("lora", "adapter"):
        config = json.loads((whole / part / "adapter_config.json").read_text())
        assert config["task_type"] == "SEQ_CLS"
        assert config["modules_to_save"] == ["pooler", "classifier"]


def test_the_best_epoch_is_exported_and_its_predictions_are_kept(
    launch: Callable, recipes: dict[str, Path], tmp_path: Path
) -> None:
    settings = ["data.held_out=10", "eval.every=4", "train.keep_best=classification"]
    words = [recipes["bert"], *settings, "train.lr=0.02", "train.patience=1", "train.epochs=6"]
    launch(WORKERS / "tasks.py", tmp_path, *words, "train.max_steps=null")
    run = tmp_path / "0"
    results, metrics = read_results(run), read_metrics(run)
    values = {m["step"]: m["dev"].get("classification") for m in metrics if "dev" in m}
    scored = {step: next(iter(value.values())) for step, value in values.items() if value}
    best = max(scored, key=scored.get)
    assert results["exported_step"] == best < results["steps"] == max(scored)
    assert results["steps"] < results["planned_steps"]
    assert {step for step in values if not scored.get(step)} >= {4}  # held-out rows alone
    recipe = load_recipe(recipes["bert"])
    exported = PeftModel.from_pretrained(load_plain_base(recipe), str(run / "lora"))
    kept = read_predictions(run, best)
    outputs = torch.tensor([row["outputs"] for row in kept], dtype=torch.float64)
    plain = predict_plainly(exported, recipe, make_rows(21, 2, False))
    torch.testing.assert_close(outputs, plain, rtol=0, atol=1e-4)
