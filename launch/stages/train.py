"""Train, with checkpoints on the way and a rehearsal of every save after the first step."""

from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import nn

from astra.adapter import Factors
from launch.engines.base import TrainState
from launch.run.metrics import Metrics
from launch.run.results import RunFacts
from launch.runtime import watchdog
from launch.runtime.distributed import print_rank0, run_on_rank0
from launch.stages.export import rehearse_small
from launch.stages.records import PreparedRun, RunModel
from launch.stages.score_steps import (
    has_stopped_early,
    plan_scoring,
    remove_later_responses,
    score_steps,
)
from launch.training.checkpoint import name_best_step, restore_training
from launch.training.flops import count_training_flops
from launch.training.kernels import (
    choose_packing,
    compile_layers,
    require_packing,
    uncompile_layers,
)
from launch.training.loop import make_train_state, train
from launch.training.loss import AnswerLoss, in_bf16
from launch.training.merged_export import describe_merged, save_merged
from launch.training.metrics_log import log_steps
from launch.training.model_export import describe_weights
from launch.training.profiling import profile_steps
from launch.training.rehearsal import (
    describe_unreached,
    find_unreached_adapters,
    refuse_unsaveable,
    require_space,
)
from launch.training.row_loss import RowLoss
from launch.training.trackers import open_trackers
from launch.training.trainable import export_trained, find_trained_parameters


def save_checkpoint(
    run: PreparedRun,
    loaded: RunModel,
    state: TrainState | None,
    initial: dict[str, Factors],
    facts: RunFacts,
    history: list[Metrics],
) -> None:
    """Save the run as it is after the last step of `history`. Collective.

    Args:
        state: the training state; None before training.
    """
    parameters = find_trained_parameters(loaded.model)
    values = facts.model_dump(mode="json", exclude_unset=True)
    run.checkpoints.save(len(history), parameters, initial, state, values, history)


def rehearse_saves(
    run: PreparedRun,
    loaded: RunModel,
    state: TrainState,
    initial: dict[str, Factors],
    facts: RunFacts,
    history: list[Metrics],
) -> None:
    """Try every way in which this run will save, before hours are spent. Collective.

    Raises UserError on every rank if one of them fails, or the disk has no room.
    """
    parameters = find_trained_parameters(loaded.model)
    values = facts.model_dump(mode="json", exclude_unset=True)
    with refuse_unsaveable(run.checkpoints):
        checkpoint = run.checkpoints.rehearse(parameters, initial, state, values, history)
        export_trained(
            checkpoint.folder, loaded.model, loaded.engine, run.inputs, initial, rehearsal=True
        )
        if run.recipe.export.merged:
            save_merged(checkpoint.folder, loaded.model, loaded.engine, run.inputs, rehearsal=True)
        if run.recipe.export.rank is not None:
            rehearse_small(run, loaded, initial, checkpoint.folder)
    num_bytes = checkpoint.num_bytes
    if run.recipe.export.merged:
        weights = describe_merged(loaded.model, run.inputs.dtype)
        num_bytes += sum(weight.nbytes for weight in weights.values())
    if not loaded.lora_layers:
        weights = describe_weights(loaded.model, run.inputs.dtype)
        num_bytes += sum(weight.nbytes for weight in weights.values())
    run_on_rank0(lambda: require_space(run.folder, num_bytes))
    unreached = checkpoint.unreached
    if loaded.lora_layers:
        unreached = find_unreached_adapters(unreached, list(parameters))
    if unreached:
        decays = run.recipe.train.weight_decay > 0
        print_rank0(describe_unreached(unreached, list(parameters), decays))


def train_model(
    run: PreparedRun,
    loaded: RunModel,
    initial: dict[str, Factors],
    facts: RunFacts,
    earlier: Sequence[Metrics],
    profile: bool,
    peak_flops: float | None,
) -> list[Metrics]:
    """Train from the last step of `earlier` on, and return these and the new steps. Collective.

    Ends early when a rank is asked to stop, or by train.patience. A checkpoint is saved on the way,
    also of the best step by train.keep_best, and at the end.
    """
    recipe, settings = run.recipe, run.recipe.train
    engine, model, total = loaded.engine, loaded.model, len(run.steps)
    history = list(earlier)  # a copy, which grows
    num_done = len(history)
    state, compiled = _make_state(run, loaded)
    plan = plan_scoring(run)
    if num_done == total or has_stopped_early(run, history):
        training: Iterator[Metrics] = iter(())
    else:
        run_on_rank0(lambda: remove_later_responses(run, num_done))
        training = train(
            state,
            run.inputs.tokens,
            run.steps,
            settings,
            engine.device,
            history=earlier,
            packing=choose_packing(recipe, loaded.base),
            flop_counts=count_training_flops(loaded.base),
            peak_flops=peak_flops,
            pauses=plan.every | plan.epochs.keys(),
        )
    watchdog.set_phase("training", timed=True, in_steps=True)
    if profile:
        training = profile_steps(training, total - num_done, run.folder, dist.get_rank())
    training = score_steps(run, loaded, training, history, plan, compiled)
    training = name_best_step(training, run.checkpoints, history)
    last_saved = num_done
    with open_trackers(recipe, run.folder, num_done) as log, in_bf16(model):
        rank = dist.get_rank()
        unit = "rows" if recipe.task.has_head else "answer tokens"
        for metrics in log_steps(training, earlier, total, run.folder, rank, log, unit):
            history.append(metrics)
            step = metrics["step"]
            if step == num_done + 1:
                rehearse_saves(run, loaded, state, initial, facts, history)
            is_best = "dev" in metrics and run.checkpoints.find_best_step(history) == step
            if (step % settings.checkpoint_every == 0 and step < total) or is_best:
                save_checkpoint(run, loaded, state, initial, facts, history)
                last_saved = step
    if len(history) != last_saved:
        save_checkpoint(run, loaded, state, initial, facts, history)
    model.gradient_checkpointing_disable()
    uncompile_layers(compiled)
    return history


def _make_state(run: PreparedRun, loaded: RunModel) -> tuple[TrainState, list[nn.Module]]:
    """Make the state of the training, as the run's checkpoint has it. Collective.

    Returns:
        The state, and the layers that are compiled.
    """
    recipe, settings = run.recipe, run.recipe.train
    engine, model = loaded.engine, loaded.model
    if recipe.data.packing:
        require_packing(engine, model)
    if settings.gradient_checkpointing:  # a bool: what was `auto` is decided
        model.gradient_checkpointing_enable({"use_reentrant": engine.reentrant})
    compiled = compile_layers(loaded.base) if settings.compile else []
    loss = RowLoss(model) if recipe.task.has_head else AnswerLoss(model)
    state = make_train_state(engine, model, settings, loss, run.inputs.model.head_parameters)
    if run.saved is not None:
        restore_training(run.saved, find_trained_parameters(model), state, engine.device)
    return state, compiled
