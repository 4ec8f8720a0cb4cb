"""Score a model on development rows after every epoch, on all ranks.

The values go with the epoch's last step into metrics.jsonl and checkpoints, so a resumed run has
those of earlier epochs. Scoring changes no number of the training: the model is in eval mode, and
every step of training seeds its own dropout. Each row's prediction is kept in predictions/.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eval.errors import EvalError
from eval.task_scores import find_constant, score, score_intervals
from launch.config.task import Task
from launch.data.batches import collate_rows
from launch.data.order import shard_batches
from launch.data.token_set import TokenSet
from launch.engines.base import Engine
from launch.run.best import find_best
from launch.run.metrics import Metrics
from launch.run.results import EpochScore, TaskScore
from launch.runtime import watchdog
from launch.runtime.distributed import print_rank0, run_on_rank0
from launch.runtime.errors import UserError
from launch.runtime.files import write_text
from launch.training.loss import has_bf16_products

PREDICTIONS = "predictions"  # folder in the run folder
# Rows of one forward pass. Fixed, so that neither a setting nor the world size changes a sum's order.
BATCH_SIZE = 16


def check_dev(dev: Mapping[str, TokenSet], task: Task) -> None:
    """Raise UserError if development rows cannot be scored by the task's metrics.

    To be called before hours are spent on an epoch.
    """
    for name, tokens in dev.items():
        labels = _read_labels(tokens)
        if task.kind == "regression" and len(set(labels)) == 1:
            raise UserError(
                f"task.dev: {name}: the label of every row is {labels[0]:g}, with which no prediction can "
                "correlate; take rows with labels"
            )
        try:
            score(_get_metric_name(task), labels, labels, kind=task.kind)
        except EvalError as error:
            raise UserError(f"task.dev: {name}: {error}") from None


@torch.no_grad()
def predict_rows(engine: Engine, model: nn.Module, tokens: TokenSet) -> Tensor:
    """Return the head's outputs for every row, (rows, outputs), fp64, on the CPU. Collective.

    The result is the same on every rank, and does not depend on how many there are.

    Args:
        model: in eval mode, and able to run forward passes: within the engine's `inference_mode`,
            or in training.
    """
    outputs, device = None, engine.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=has_bf16_products(model))
    examples = range(len(tokens))
    for batch in shard_batches(examples, dist.get_rank(), dist.get_world_size(), BATCH_SIZE):
        watchdog.heartbeat()
        with autocast:
            logits = model(**collate_rows(tokens, batch).to(device).inputs()).logits
        if outputs is None:
            shape = (len(tokens), logits.shape[-1])
            outputs = torch.zeros(shape, dtype=torch.float64, device=device)
        for place, example in enumerate(batch):
            if example is not None:
                outputs[example] = logits[place].double()
    dist.all_reduce(outputs)  # each row is on one rank, and 0 on the others
    return outputs.cpu()


def find_epoch_ends(num_examples: int, steps: Sequence[Sequence[int]]) -> dict[int, float]:
    """Return the steps, from 1, after which development rows are scored -> epochs done by then.

    Those are the step that trains an epoch's last row, and the last step. Such a step may also hold
    rows of the next epoch; it counts as the end of the epoch.
    """
    ends, num_done, epoch = {}, 0, 0
    for number, examples in enumerate(steps, start=1):
        num_done += len(examples)
        if num_done // num_examples > epoch:
            epoch = num_done // num_examples
            ends[number] = float(epoch)
    if steps and len(steps) not in ends:
        ends[len(steps)] = num_done / num_examples
    return ends


def score_sets(
    engine: Engine,
    model: nn.Module,
    dev: Mapping[str, TokenSet],
    task: Task,
    folder: Path,
    history: Sequence[Metrics],
    step: int,
    epoch: float,
    keep_best: str | None = None,
) -> dict[str, dict[str, float]]:
    """Score every set of development rows, keep the predictions, and print the scores. Collective.

    Args:
        folder: of the run.
        history: the steps so far, with the scores of earlier epochs.
        keep_best: the score by which the run keeps its best step; the predictions of that step are
            kept too.

    Returns:
        Name of the score -> metric -> value; the first metric is the one that epochs are compared by.

    Raises:
        UserError: an output is not finite.
    """
    values = {}
    for name, tokens in dev.items():
        outputs = predict_rows(engine, model, tokens)

        def finish(name: str = name, tokens: TokenSet = tokens, outputs: Tensor = outputs) -> dict:
            if not outputs.isfinite().all():
                raise EvalError(f"{name}: the model gives outputs that are not finite")
            predictions = _choose_predictions(outputs, task)
            labels = _read_labels(tokens)
            found = score(_get_metric_name(task), predictions, labels, kind=task.kind)
            _write_predictions(folder, name, step, task, tokens, outputs)
            best = find_best([*history, {"step": step, "dev": {name: found}}], name)
            exported = None if keep_best is None else find_best(history, keep_best)
            kept = {step, best.step} | ({exported.step} if exported else set())
            _remove_predictions(folder, name, kept)
            constant = find_constant(predictions, labels)
            _print_scores(name, epoch, found, len(tokens), constant)
            return found

        values[name] = run_on_rank0(finish)
    return values


def summarise_epochs(
    history: Sequence[Metrics], dev: Mapping[str, TokenSet], task: Task, folder: Path
) -> dict[str, TaskScore]:
    """Return the record of every set's scores: all epochs, the last and the best. Rank 0 calls it.

    Intervals are those of the last and of the best epoch, from the kept predictions.
    """
    scores = {}
    for name, tokens in dev.items():
        epochs = []
        for metrics in history:
            if name in metrics.get("dev", {}):
                values = metrics["dev"][name]
                epochs.append(
                    EpochScore(epoch=metrics["epoch"], step=metrics["step"], values=values)
                )
        if not epochs:
            continue
        best_step = find_best(history, name).step
        last, best = epochs[-1], next(one for one in epochs if one.step == best_step)
        scores[name] = TaskScore(
            metric=next(iter(last.values)),
            n=len(tokens),
            most_frequent=_find_most_frequent(tokens, task),
            last=_complete_score(last, name, tokens, task, folder),
            best=_complete_score(best, name, tokens, task, folder),
            epochs=epochs,
        )
    return scores


def _complete_score(
    epoch: EpochScore, name: str, tokens: TokenSet, task: Task, folder: Path
) -> EpochScore:
    """Return the epoch's score with what its predictions say; as it is, if these are gone.

    That is its intervals, and whether all predictions are the same.
    """
    path = _name_file(folder, name, epoch.step)
    if not path.is_file():
        return epoch
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    outputs = torch.tensor([row["outputs"] for row in rows], dtype=torch.float64)
    predictions = _choose_predictions(outputs, task)
    labels = _read_labels(tokens)
    intervals = score_intervals(_get_metric_name(task), predictions, labels, kind=task.kind)
    constant = find_constant(predictions, labels)
    return epoch.model_copy(update={"intervals": intervals, "constant": constant})


def _find_most_frequent(tokens: TokenSet, task: Task) -> float | None:
    """Return the share of the rows with the most frequent label; None for numbers."""
    if not task.labels:
        return None
    return Counter(_read_labels(tokens)).most_common(1)[0][1] / len(tokens)


def _get_metric_name(task: Task) -> str:
    """Return the name by which eval.task_scores finds the metrics."""
    return task.name or task.kind


def _choose_predictions(outputs: Tensor, task: Task) -> list[int] | list[float]:
    """Return each row's class, the first of the largest outputs, or its number."""
    return (outputs.argmax(1) if task.labels else outputs[:, 0]).tolist()


def _read_labels(tokens: TokenSet) -> list[int] | list[float]:
    """Return each row's label: the place of its class, or its number."""
    return tokens.labels.tolist()


def _print_scores(
    name: str, epoch: float, values: Mapping[str, float], n: int, constant: str | None
) -> None:
    """Print one set's scores after an epoch."""
    shown = ", ".join(f"{metric} {value:.4f}" for metric, value in values.items())
    note = f"; all {constant} are the same" if constant else ""
    print_rank0(f"development: {name} after epoch {epoch:.4g}: {shown} (n = {n}){note}")


def _name_file(folder: Path, name: str, step: int) -> Path:
    """Return the path of a set's predictions after a step."""
    return folder / PREDICTIONS / f"{_clean_name(name)}-step-{step:07d}.jsonl"


def _clean_name(name: str) -> str:
    """Return a name that can be a file's, another one for each name."""
    return quote(name, safe="")


def _write_predictions(
    folder: Path, name: str, step: int, task: Task, tokens: TokenSet, outputs: Tensor
) -> None:
    """Write a line for each row: its number from 1, label, prediction, and the head's outputs."""
    lines = []
    predictions = _choose_predictions(outputs, task)
    labels = _read_labels(tokens)
    for number, (label, chosen, row) in enumerate(
        zip(labels, predictions, outputs.tolist(), strict=True), start=1
    ):
        if task.labels:
            label, chosen = task.labels[label], task.labels[chosen]
        fields = {"row": number, "label": label, "prediction": chosen, "outputs": row}
        lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
    path = _name_file(folder, name, step)
    path.parent.mkdir(exist_ok=True)
    write_text(path, "".join(lines))


def _remove_predictions(folder: Path, name: str, kept: set[int]) -> None:
    """Remove a set's predictions after other steps than those `kept`."""
    wanted = {_name_file(folder, name, step) for step in kept}
    pattern = f"{_clean_name(name)}-step-{'[0-9]' * 7}.jsonl"
    for path in (folder / PREDICTIONS).glob(pattern):
        if path not in wanted:
            path.unlink()
