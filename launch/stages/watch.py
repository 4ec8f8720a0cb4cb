"""Score the model while it trains, and go back to its best step at the end.

No number of the training changes by it: the model is in eval mode, nothing is updated, and every
step of training seeds its own dropout.

"Collective" in a docstring means that every rank must call the function, in the same order.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from launch.run.best import find_best, stops_early
from launch.run.metrics import Metrics
from launch.runtime import watchdog
from launch.runtime.distributed import print_rank0, run_on_rank0
from launch.scoring.development import find_epoch_ends, score_sets
from launch.scoring.held_out import measure_predictions
from launch.stages.records import ON_THE_WAY, PreparedRun, RunModel
from launch.stages.score import score_run
from launch.training.checkpoint import restore_trained
from launch.training.loss import in_own_dtypes
from launch.training.trainable import find_trained_parameters


class ScoredSteps(NamedTuple):
    """The steps, from 1, after which the model is scored while it trains."""

    epochs: dict[int, float]  # those that end an epoch -> epochs done; development rows
    every: set[int]  # those of eval.every, and the last: losses and benchmarks


def find_scored_steps(run: PreparedRun) -> ScoredSteps:
    """Return the steps after which a run's model is scored."""
    epochs = find_epoch_ends(len(run.inputs.tokens), run.steps) if run.inputs.dev else {}
    every, total = run.recipe.eval.every, len(run.steps)
    return ScoredSteps(epochs, set() if every is None else {*range(every, total, every), total})


def score_on_the_way(
    run: PreparedRun,
    loaded: RunModel,
    training: Iterator[Metrics],
    history: Sequence[Metrics],
    steps: ScoredSteps,
) -> Iterator[Metrics]:
    """Yield the steps of `training`, the scored ones with their scores as `dev`. Collective.

    Args:
        history: the steps before, to which the caller adds those that are yielded.
    """
    model, inputs, task = loaded.model, run.inputs, run.recipe.task
    for metrics in training:
        step = metrics["step"]
        scored: Metrics = {}
        if step in steps.epochs or step in steps.every:
            model.eval()
        if step in steps.epochs:
            epoch = steps.epochs[step]
            dev = score_sets(
                loaded.engine, model, inputs.dev, task, run.folder, history, step, epoch
            )
            scored = {"epoch": epoch, "dev": dev}
        if step in steps.every:
            measured = _measure(run, loaded, step)
            scored["dev"] = measured | scored.get("dev", {})
            print_rank0(f"after step {step}: {_describe(measured)}")
        if scored:
            model.train()
        yield metrics | scored


def _measure(run: PreparedRun, loaded: RunModel, step: int) -> dict[str, dict[str, float]]:
    """Measure losses and score the benchmarks of eval.every_suites. Collective.

    Returns:
        Name of the score -> metric -> value, alike on every rank.
    """
    watchdog.heartbeat(f"scoring after step {step}")
    folder = run.folder / ON_THE_WAY / f"step-{step:07d}"
    settings, problems = run.recipe.eval.while_training, run.problems_on_the_way
    with in_own_dtypes(loaded.model):
        measured = measure_predictions(loaded.engine, loaded.model, run.measured)
        scores = score_run(run, loaded, problems, settings, f"after step {step}", folder)
    values: dict[str, dict[str, float]] = {}
    for name, prediction in measured.items():
        values[name] = {"loss": prediction.loss}
        if prediction.accuracy is not None:
            values[name]["accuracy"] = prediction.accuracy
    values |= {name: {"accuracy": score.accuracy} for name, score in scores.items()}
    return run_on_rank0(lambda: values)  # what the ranks decide by it must not differ in a bit


def _describe(values: dict[str, dict[str, float]]) -> str:
    """Describe scores in a line."""
    described = []
    for name, metrics in values.items():
        shown = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
        described.append(f"{name} {shown}")
    return "; ".join(described)


def has_stopped_early(run: PreparedRun, history: Sequence[Metrics]) -> bool:
    """Return whether train.patience ends the run after the last step of `history`."""
    settings = run.recipe.train
    return stops_early(history, settings.keep_best, settings.patience)


def restore_best(run: PreparedRun, loaded: RunModel, history: Sequence[Metrics]) -> int:
    """Set what is trained to what it was after the best step. Collective.

    Returns:
        The step that is exported: the best by train.keep_best; without it, or where no score was a
        finite number, the last.
    """
    last, name = len(history), run.recipe.train.keep_best
    if name is None:
        return last
    best = find_best(history, name)
    if best is None:
        print_rank0(f"train.keep_best: {name} was never a finite number; step {last} is exported")
        return last
    print_rank0(
        f"best by {name}: step {best.step} of {last}, {best.metric} {best.value:.4f}, which is "
        "exported"
    )
    if best.step < last:
        checkpoint = run_on_rank0(lambda: run.checkpoints.read_best(best.step))
        restore_trained(checkpoint, find_trained_parameters(loaded.model), loaded.engine)
    return best.step
