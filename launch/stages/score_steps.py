"""Score the model while it trains, and go back to its best step at the end.

No number of the training changes by it: the model is in eval mode, nothing is updated, and every
step of training seeds its own dropout.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from launch.run.best import find_best, stops_early
from launch.run.metrics import Metrics
from launch.runtime import watchdog
from launch.runtime.compat.torch_parts import run_uncompiled
from launch.runtime.distributed import print_rank0, run_on_rank0
from launch.scoring.development import find_epoch_ends, score_sets
from launch.scoring.held_out import measure_predictions
from launch.scoring.responses import set_aside
from launch.stages.records import WHILE_TRAINING, PreparedRun, RunModel
from launch.stages.score import score_run
from launch.training.checkpoint import restore_trained
from launch.training.loss import in_own_dtypes
from launch.training.trainable import find_trained_parameters

Scores = dict[str, dict[str, float]]
"""Name of the score -> metric -> value, as Metrics.dev has it."""


class ScoringPlan(NamedTuple):
    """The steps, from 1, after which the model is scored."""

    epochs: dict[int, float]  # those that end an epoch -> epochs done; development rows
    every: set[int]  # those of eval.every, and the last: losses and benchmarks


def plan_scoring(run: PreparedRun) -> ScoringPlan:
    """Return the steps after which a run's model is scored."""
    epochs = find_epoch_ends(len(run.inputs.tokens), run.steps) if run.inputs.dev else {}
    every, total = run.recipe.eval.every, len(run.steps)
    return ScoringPlan(epochs, set() if every is None else {*range(every, total, every), total})


def remove_later_responses(run: PreparedRun, num_done: int) -> None:
    """Remove the responses of steps that are to be trained again; those of the last are set aside.

    With dropout on another number of ranks, or on a GPU, the model after such a step is another one.
    Rank 0 calls it.
    """
    set_aside(run.folder)
    for folder in (run.folder / WHILE_TRAINING).glob("step-*"):
        if int(folder.name.removeprefix("step-")) > num_done:
            shutil.rmtree(folder)


def score_steps(
    run: PreparedRun,
    loaded: RunModel,
    training: Iterator[Metrics],
    history: Sequence[Metrics],
    plan: ScoringPlan,
    compiled: Sequence[nn.Module],
) -> Iterator[Metrics]:
    """Yield the steps of `training`, the scored ones with their scores as `dev`. Collective.

    Ends after the step at which train.patience is over.

    Args:
        history: the steps before, to which the caller adds those that are yielded.
        compiled: layers that are compiled for training; scoring runs them as they were written,
            since their shapes and modes would have them compiled again and again.
    """
    settings = run.recipe.train
    for metrics in training:
        step = metrics["step"]
        is_scored = step in plan.epochs or step in plan.every
        if is_scored:
            began = time.perf_counter()
            loaded.model.eval()
            with run_uncompiled(compiled):
                metrics = metrics | _score_step(run, loaded, history, plan, step)
            loaded.model.train()
            metrics["scoring_seconds"] = time.perf_counter() - began
            # Ranks count their heartbeats alike again.
            watchdog.set_phase("training", timed=True, in_steps=True)
        yield metrics
        if is_scored and step < len(run.steps) and has_stopped_early(run, history):
            print_rank0(
                f"stops early: {settings.patience} scores in a row have brought no better "
                f"{settings.keep_best}"
            )
            return


def _score_step(
    run: PreparedRun, loaded: RunModel, history: Sequence[Metrics], plan: ScoringPlan, step: int
) -> dict:
    """Score the model after `step`; return the fields of Metrics that it adds. Collective."""
    scored: dict = {"dev": {}}
    if step in plan.epochs:
        scored["epoch"] = plan.epochs[step]
        scored["dev"] = score_sets(
            engine=loaded.engine,
            model=loaded.model,
            dev=run.inputs.dev,
            task=run.recipe.task,
            folder=run.folder,
            history=history,
            step=step,
            epoch=plan.epochs[step],
            keep_best=run.recipe.train.keep_best,
        )
    if step in plan.every:
        measured = _measure(run, loaded, step)
        print_rank0(f"after step {step}: {_describe(measured)}")
        scored["dev"] = measured | scored["dev"]
    return scored


def _measure(run: PreparedRun, loaded: RunModel, step: int) -> Scores:
    """Measure losses and score the benchmarks of eval.every_suites, alike on every rank. Collective."""
    watchdog.heartbeat(f"scoring after step {step}")
    settings, problems = run.recipe.eval.while_training, run.problems_while_training
    with in_own_dtypes(loaded.model):
        measured = measure_predictions(loaded.engine, loaded.model, run.measured)
        scores = score_run(
            run, loaded, problems, settings, f"after step {step}", get_responses_folder(run, step)
        )
    values: Scores = {}
    for name, prediction in measured.items():
        values[name] = {"loss": prediction.loss}
        if prediction.accuracy is not None:
            values[name]["accuracy"] = prediction.accuracy
    values |= {name: {"accuracy": score.accuracy} for name, score in scores.items()}
    return run_on_rank0(lambda: values)  # what the ranks decide by it must not differ in a bit


def get_responses_folder(run: PreparedRun, step: int) -> Path:
    """Return the folder of the responses after a step."""
    return run.folder / WHILE_TRAINING / f"step-{step:07d}"


def _describe(scores: Scores) -> str:
    """Describe scores in a line."""
    described = []
    for name, metrics in scores.items():
        shown = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
        described.append(f"{name} {shown}")
    return "; ".join(described)


def has_stopped_early(run: PreparedRun, history: Sequence[Metrics]) -> bool:
    """Return whether train.patience ends the run after the last step of `history`."""
    settings = run.recipe.train
    return stops_early(history, settings.keep_best, settings.patience)


def restore_best(run: PreparedRun, loaded: RunModel, history: Sequence[Metrics]) -> int | None:
    """Set what is trained to what it was after the best step. Collective.

    Returns:
        The best step by train.keep_best. None without it, or where no score was a finite number:
        what is trained is then left as it was after the last step.
    """
    last, name = len(history), run.recipe.train.keep_best
    if name is None:
        return None
    best = find_best(history, name)
    if best is None:
        print_rank0(f"train.keep_best: {name} was never a finite number; step {last} is exported")
        return None
    print_rank0(
        f"best by {name}: step {best.step} of {last}, {best.metric} {best.value:.4f}, which is "
        "exported"
    )
    if best.step < last:
        watchdog.set_phase("going back to the best step")  # its checkpoint is read whole
        checkpoint = run_on_rank0(lambda: run.checkpoints.read_best(best.step))
        restore_trained(checkpoint, find_trained_parameters(loaded.model), loaded.engine)
    return best.step
