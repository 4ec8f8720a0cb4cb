"""Write the record of a finished run."""

import time
from typing import Any

import torch.distributed as dist

from launch.models.check import read_config
from launch.models.head import is_encoder
from launch.run.best import find_best, list_score_names, list_scored_steps
from launch.run.folder import write_state
from launch.run.metrics import Metrics
from launch.run.provenance import describe_conditions, name_dtype
from launch.run.results import (
    LastAndBest,
    Prediction,
    RunFacts,
    RunResults,
    Score,
    SmallExport,
    StepScore,
    TaskRecord,
    TaskScore,
    write_results,
)
from launch.runtime.distributed import find_nodes, run_on_rank0, try_or_say
from launch.runtime.memory import gather_peak_memory
from launch.scoring.development import summarise_epochs
from launch.stages.records import CONFIG, PreparedRun, RunModel
from launch.training.export import read_plain_rank
from launch.training.model_card import render_model_card
from launch.training.trainable import count_trained_parameters


def make_results(
    run: PreparedRun,
    loaded: RunModel,
    facts: RunFacts,
    history: list[Metrics],
    best_step: int | None,
    scores: dict[str, Score],
    after: dict[str, Prediction],
    small: SmallExport | None,
    peak_flops: float | None,
) -> RunResults:
    """Return the run's record, with the conditions that its numbers hold for. Collective.

    Args:
        best_step: whose model was exported, scored and measured; None: the last.
        after: measured set -> the trained model's prediction.
        small: of lora_small/; None where it was not asked for.
    """
    recipe, adapter, device = run.recipe, run.recipe.adapter, loaded.engine.device
    has_adapters = bool(loaded.lora_layers)
    has_eigen_select = adapter.method_record.variant == "eigen_select"
    conditions = describe_conditions(dist.get_world_size(), device)
    conditions["nodes"] = len(find_nodes())
    conditions["peak_tflops"] = peak_flops and peak_flops / 1e12
    # held_out and other_text are left out where they were not measured.
    measured = {name: {"before": facts.before[name], "after": after[name]} for name in after}
    if small is not None:
        measured["small"] = small
    base = run.inputs.base
    if CONFIG not in facts.inputs:  # a run of an earlier version: not known of its first steps
        base = {key: value for key, value in base.items() if key != "config_sha256"}
    return RunResults(
        recipe=run.name,
        model=run.model_name,
        base=base,
        data=run.inputs.data,
        method=adapter.method,
        variant=recipe.variant,
        eigen_select=adapter.eigen_select if has_eigen_select else None,
        rank=adapter.rank if has_adapters else None,
        lora_rank=run_on_rank0(lambda: read_plain_rank(run.folder)),
        alpha=adapter.alpha if has_adapters else None,
        lr=recipe.train.lr,
        seed=recipe.train.seed,
        steps=len(history),
        final_loss=history[-1]["loss"],
        **measured,
        **_collect_optional(run, facts) | _describe_steps(run, history, best_step),
        other_text_source=run.other_text_source,
        trained_parameters=count_trained_parameters(loaded.model),
        peak_memory=gather_peak_memory(device),
        logit_drift=facts.logit_drift,
        residual_rounding=facts.residual_rounding,
        engine=recipe.engine,
        dtype=name_dtype(run.inputs.dtype),
        seconds=_measure_seconds(run, facts, history),
        baseline=facts.baseline,
        scores=scores | _summarise_epochs(run, history),
        conditions=conditions,
    )


def _summarise_epochs(run: PreparedRun, history: list[Metrics]) -> dict[str, TaskScore]:
    """Return the scores of development rows. Collective."""
    dev, task = run.inputs.dev, run.recipe.task
    return run_on_rank0(lambda: summarise_epochs(history, dev, task, run.folder))


def _collect_optional(run: PreparedRun, facts: RunFacts) -> dict[str, Any]:
    """Return the keys of results.json that are left out where there is nothing to say."""
    recipe = run.recipe
    # Not known of a run of an earlier version.
    optional = facts.model_dump(include={"calibration_data"}, exclude_unset=True)
    if recipe.train.lr_ratio != 1:
        optional["lr_ratio"] = recipe.train.lr_ratio
    if facts.decided:
        optional["decided"] = facts.decided
    if recipe.shard_within != "all":
        optional["shard_within"] = recipe.shard_within
    if recipe.task.has_head:
        optional["task"] = _describe_task(run)
    if recipe.train.head_lr is not None:
        optional["head_lr"] = recipe.train.head_lr
    if recipe.note:
        optional["note"] = recipe.note
    return optional


def _describe_steps(
    run: PreparedRun, history: list[Metrics], best_step: int | None
) -> dict[str, Any]:
    """Return what scores while training have brought, and which step they have chosen."""
    described: dict[str, Any] = {}
    if len(history) < len(run.steps):
        described["planned_steps"] = len(run.steps)
    if best_step is not None:
        described["exported_step"] = best_step
    scores = {}
    for name in list_score_names(history):
        if name not in run.inputs.dev:  # whose epochs are in `scores`
            last, best = list_scored_steps(history, name)[-1], find_best(history, name)
            scores[name] = LastAndBest(
                metric=last.metric,
                last=StepScore(step=last.step, value=last.value),
                best=best and StepScore(step=best.step, value=best.value),
            )
    return described | ({"while_training": scores} if scores else {})


def _measure_seconds(run: PreparedRun, facts: RunFacts, history: list[Metrics]) -> dict[str, float]:
    """Return the seconds of calibration and training, and of the whole run."""
    return {
        "calibration": facts.calibration_seconds,
        "training": history[-1]["seconds"],
        "total": time.monotonic() - run.started,
    }


def _describe_task(run: PreparedRun) -> TaskRecord:
    """Return the record of the run's new head."""
    task, base = run.recipe.task, run.inputs.model
    pad_token = None if is_encoder(read_config(base.folder)) else base.head.pad_token
    return TaskRecord(kind=task.kind, labels=task.labels, pad_token=pad_token)


def write_run_results(run: PreparedRun, results: RunResults) -> None:
    """Write the model card and results.json. Rank 0 calls it.

    If the card cannot be written, a warning is printed. results.json comes after everything else:
    that it is there marks the run as finished. state.json only repeats that.
    """

    def write_card() -> None:
        card = render_model_card(run.folder, run.recipe, results)
        (run.folder / "README.md").write_text(card, encoding="utf-8")

    try_or_say("the model card", write_card)
    write_results(run.folder, results)
    write_state(run.folder, "finished")
