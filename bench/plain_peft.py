"""Score runs of a task again with transformers and PEFT alone: the same score and the same outputs.

    python bench/plain_peft.py runs/mrpc-lora runs/mrpc-astra

Loads each run's base with AutoModelForSequenceClassification and its lora/ with PeftModel, tokenises the
development rows as the run's recipe names them, and compares with the run's results.json and
predictions/. Of this project it uses what finds the rows, and eval.task_scores.score, which scored the
run too (tests/eval/test_task_scores.py compares it with scikit-learn and scipy). Prints a line for each
set of rows; ends with 1 if a score differs, that of a regression by more than TOLERANCE, or an output by
more than TOLERANCE of the largest.
"""

import argparse
import json
import sys
from pathlib import Path
from urllib.parse import quote

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from eval.task_scores import score
from launch.config.loading import read_stored_recipe
from launch.config.schema import Recipe
from launch.data.layout import find_split
from launch.data.rows import fetch_source
from launch.data.task_rows import locate_dev

TOLERANCE = 1e-3  # relative; exported factors are fp32 and the order of sums differs
BATCH = 32


def read_development_rows(recipe: Recipe, name: str) -> list[dict]:
    """Return the rows of one development set, as they are read."""
    data = locate_dev(recipe.data, name, recipe.task.dev_sets[name])
    return list(find_split(fetch_source(data), data.split, data.config).iterate_rows(None))


@torch.no_grad()
def predict(folder: Path, recipe: Recipe, rows: list[dict]) -> torch.Tensor:
    """Return the outputs of a run's lora/ on its base for every row, (rows, outputs)."""
    name, task = recipe.model.name, recipe.task
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=max(1, len(task.labels)), dtype=torch.float32
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    base.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(base, str(folder / "lora")).eval()
    outputs = []
    for begin in range(0, len(rows), BATCH):
        batch = rows[begin : begin + BATCH]
        texts = [[row[field] for row in batch] for field in filter(None, fields_of(recipe))]
        tokens = tokenizer(
            *texts,
            truncation=True,
            max_length=recipe.data.max_length,
            padding=True,
            return_tensors="pt",
        )
        outputs.append(model(**tokens).logits.double())
    return torch.cat(outputs)


def fields_of(recipe: Recipe) -> tuple[str, str | None]:
    """Return the fields of a row's texts."""
    return recipe.task.sentence1, recipe.task.sentence2


def read_label(value: object, recipe: Recipe) -> int | float:
    """Return a row's label as an index of its class, or as a number."""
    labels = recipe.task.labels
    if str(value) in labels:
        return labels.index(str(value))
    return int(value) if labels else float(value)


def compare_run(folder: Path) -> bool:
    """Print a run's scores beside those of plain PEFT, and return whether they agree."""
    recipe = read_stored_recipe(folder / "recipe.yaml")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    if results["dtype"] != "float32" or recipe.data.filter or recipe.data.prepared:
        sys.exit(
            f"{folder}: only runs in float32, without data.filter and data.prepared, are compared"
        )
    agrees = True
    for name, stored in results["scores"].items():
        rows = read_development_rows(recipe, name)
        outputs = predict(folder, recipe, rows)
        step = results.get("exported_step", stored["last"]["step"])
        epochs = [epoch["values"] for epoch in stored["epochs"] if epoch["step"] == step]
        if not epochs:
            sys.exit(f"{folder}: step {step}, which it exports, was not scored on {name}")
        kept = (folder / "predictions" / f"{quote(name, safe='')}-step-{step:07d}.jsonl").read_text(
            "utf-8"
        )
        ours = torch.tensor(
            [json.loads(line)["outputs"] for line in kept.splitlines()], dtype=torch.float64
        )
        error = float((outputs - ours).abs().max() / ours.abs().max())
        labels = [read_label(row[recipe.task.label], recipe) for row in rows]
        predictions = outputs.argmax(1) if recipe.task.labels else outputs[:, 0]
        task = recipe.task.name or recipe.task.kind
        plain = score(task, predictions.tolist(), labels, kind=recipe.task.kind)
        # Classes are the same; the numbers of a regression are so to rounding, and so is its score.
        tolerance = 1e-9 if recipe.task.labels else TOLERANCE
        same = error <= TOLERANCE and all(
            abs(plain[metric] - value) <= tolerance for metric, value in epochs[0].items()
        )
        agrees = agrees and same
        shown = ", ".join(
            f"{metric} {value:.4f} (the run: {epochs[0][metric]:.4f})"
            for metric, value in plain.items()
        )
        print(
            f"{folder.name}: {name}, n = {len(rows)}: {shown}; outputs differ by at most {error:.1e} "
            f"of the largest: {'the same' if same else 'DIFFERENT'}",
            flush=True,
        )
    return agrees


def main() -> None:
    """Compare the runs of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of one task each")
    options = parser.parse_args()
    agreements = [compare_run(folder) for folder in options.runs]
    sys.exit(0 if all(agreements) else 1)


if __name__ == "__main__":
    main()
