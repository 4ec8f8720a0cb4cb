"""Make sweeps whose runs have finished with given results, without running them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from launch.run.results import RESULTS
from launch.sweeps.table import Cell, Run, Sweep, read_table

TABLE = {
    "recipe": "metamath",
    "seeds": [1, 2, 3],
    "suites": ["gsm8k", "math"],
    "rows": {
        "a_1": {"set": {"adapter.method": "lora"}},
        "b": {"set": {"adapter.eigen_select": "largest"}},
        "c": {"set": {"adapter.eigen_select": "middle"}},
    },
}


def make_score(accuracy: float, **others: object) -> dict:
    """Return a score of 200 problems as results.json holds it."""
    score = {"accuracy": accuracy, "n": 200, "correct": 0, "interval": [0.0, 1.0]}
    return score | {"literature": score, "prompt": "recipe", "data_sha256": "g"} | others


def make_prediction(loss: float, accuracy: float = 0.5) -> dict:
    """Return how well a model predicts some tokens as results.json holds it."""
    return {"loss": loss, "accuracy": accuracy, "tokens": 100}


def make_held_out(loss: float) -> dict:
    """Return a held-out loss after training as results.json holds it."""
    return {"before": make_prediction(2.0), "after": make_prediction(loss)}


def make_data(tokens_sha256: str = "t") -> dict:
    """Return the training data as results.json holds it."""
    return {"path": "d", "tokens_sha256": tokens_sha256, "rows": 9, "cut": 0, "dropped": {}}


def make_results(accuracy: float, **others: object) -> dict:
    """Return the results.json of a run with this score of gsm8k, and a loss that falls with it."""
    return {
        "recipe": "r",
        "model": "m",
        "base": {"name": "m", "weights_sha256": "w"},
        "data": make_data(),
        "method": "lora",
        "rank": 128,
        "alpha": 128.0,
        "lr": 2e-5,
        "seed": 1,
        "steps": 3,
        "final_loss": 1.0,
        "held_out": make_held_out(1 - accuracy),
        "other_text": {"before": make_prediction(1.0, 0.5), "after": make_prediction(1.5, 0.25)},
        "other_text_source": {"path": "o", "sha256": "o"},
        "trained_parameters": 3_000_000,
        "peak_memory": [2**30, 3 * 2**30],
        "logit_drift": 0.0,
        "residual_rounding": 0.0,
        "engine": "single",
        "dtype": "float32",
        "seconds": {"calibration": 1.0, "training": 2.0},
        "baseline": {},
        "scores": {"gsm8k": make_score(accuracy)},
        "conditions": {"git_revision": "r", "world_size": 2, "device": "cpu"},
    } | others


def write_results(sweep: Sweep, run: Run, results: Mapping) -> None:
    """Write the results.json of a run of the sweep."""
    folder = sweep.folder / run.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS).write_text(json.dumps(results))


def make_sweep(
    folder: Path, scores: Mapping[str | Cell, Sequence[float | None]], **fields: object
) -> Sweep:
    """Make the sweep of TABLE with other `fields`, in `folder`.

    Args:
        scores: row, or cell (or its name) where something varies -> accuracy by seed; None has not
            been run.
    """
    path = folder / "t.yaml"
    path.write_text(yaml.safe_dump(TABLE | fields))
    sweep = read_table(str(path), (), folder / "runs")
    for cell in sweep.list_cells():
        accuracies = scores[cell.name if cell.name in scores else cell]
        for run, accuracy in zip(sweep.list_eval_runs(cell)["recipe"], accuracies, strict=True):
            if accuracy is None:
                continue
            write_results(sweep, run, make_results(accuracy))
            steps = [
                {"step": i, "loss": 5 - i - accuracy, "grad_norm": 0.1 + i} for i in range(1, 4)
            ]
            lines = [json.dumps(step) + "\n" for step in steps]
            (sweep.folder / run.name / "metrics.jsonl").write_text("".join(lines))
    return sweep


def make_task_score(last: dict[str, float], best: dict[str, float]) -> dict:
    """Return scores of development rows as results.json holds them."""
    epochs = [
        {"epoch": 1.0, "step": 3, "values": best},
        {"epoch": 2.0, "step": 6, "values": last},
    ]
    return {
        "metric": next(iter(last)),
        "n": 200,
        "last": epochs[1],
        "best": epochs[0],
        "epochs": epochs,
    }
