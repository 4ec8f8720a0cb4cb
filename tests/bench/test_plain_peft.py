"""bench/plain_peft.py finds a score or an output that differs, of classes and of numbers.

Its runs are folders made here around an adapter that PEFT writes; nothing is trained. 10 s.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from scipy import stats
from torch import Tensor

from launch.config.schema import Recipe
from tests.support.classifiers import (
    LABELS,
    TARGETS,
    load_plain_base,
    load_recipe,
    make_recipe,
    make_rows,
    predict_plainly,
)
from tests.support.paths import ROOT
from tests.support.processes import make_environment

STEP = 20


def make_adapter(recipe: Recipe) -> PeftModel:
    """Make a random adapter with a random head."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        target_modules=TARGETS["bert"],
        task_type="SEQ_CLS",
        modules_to_save=["classifier"],
        init_lora_weights=False,
    )
    return get_peft_model(load_plain_base(recipe), config)


def score_rows(outputs: Tensor, labels: list, regression: bool) -> dict[str, float]:
    """Return the scores that a run records."""
    if regression:
        numbers = outputs[:, 0].numpy()
        pearson, spearman = stats.pearsonr(numbers, labels), stats.spearmanr(numbers, labels)
        return {"pearson": float(pearson.statistic), "spearman": float(spearman.statistic)}
    chosen = [LABELS[i] for i in outputs.argmax(1).tolist()]
    return {"accuracy": sum(map(str.__eq__, chosen, labels)) / len(labels)}


def write_run(
    folder: Path, recipe: Recipe, model: PeftModel, outputs: Tensor, values: dict[str, float]
) -> Path:
    """Write the folder of a run that recorded these outputs and scores, and return it."""
    model.save_pretrained(folder / "lora")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    (name,) = recipe.task.dev_sets
    lines = [json.dumps({"outputs": row}) + "\n" for row in outputs.tolist()]
    (folder / "predictions").mkdir()
    (folder / "predictions" / f"{name}-step-{STEP:07d}.jsonl").write_text("".join(lines))
    last = {"step": STEP, "values": values}
    scores = {name: {"last": last, "epochs": [last]}}
    (folder / "results.json").write_text(json.dumps({"dtype": "float32", "scores": scores}))
    return folder


@pytest.mark.slow
def test_a_score_or_an_output_that_differs_is_found(tmp_path: Path) -> None:
    runs, wanted = [], []
    for kind, regression in (("classes", False), ("numbers", True)):
        recipe = load_recipe(make_recipe(tmp_path / kind, "bert", regression))
        rows = make_rows(21, 2, regression)
        model = make_adapter(recipe)
        outputs = predict_plainly(model, recipe, rows)
        values = score_rows(outputs, [row["label"] for row in rows], regression)
        last = list(values)[-1]
        records = {
            "same": (outputs * (1 + 1e-5), values),  # to rounding
            "other-score": (outputs, values | {last: values[last] + 0.01}),
            "other-output": (outputs + 0.01 * outputs.abs().max(), values),
        }
        for name, record in records.items():
            runs.append(write_run(tmp_path / f"{kind}-{name}", recipe, model, *record))
            wanted.append("the same" if name == "same" else "DIFFERENT")
    command = [sys.executable, str(ROOT / "bench" / "plain_peft.py"), *map(str, runs)]
    done = subprocess.run(command, capture_output=True, text=True, env=make_environment())
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if ", n = 21: " in line]
    assert [line.rsplit(": ", 1)[1] for line in lines] == wanted, done.stdout
