"""The main path of a fine-tuning run, from top to bottom: one function for each stage.

"Collective" in a docstring means that every rank must call the function, in the same order.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from astra.adapter import ADAPTER, Factors, get_base_layers, initialise_layers, read_factors
from eval.tasks.base import Problem
from launch.calibration.batches import check_samples
from launch.calibration.run import (
    allocate_lora_ranks,
    calibrate_base,
    make_factor_source,
    obtain_calibration,
)
from launch.calibration.store import read_seconds
from launch.config.schema import Recipe
from launch.data.batches import collate_examples
from launch.data.inputs import Inputs, prepare_inputs, resolve_dtype
from launch.data.order import describe_idle_ranks, plan_steps
from launch.data.token_set import TokenSet
from launch.engines import Engine, make_engine
from launch.engines.base import TrainState
from launch.planning.budget import decide_memory
from launch.quickstart.base import resolve_quickstart
from launch.run.folder import open_run, write_state
from launch.run.metrics import Metrics
from launch.run.plots import plot_runs
from launch.run.provenance import describe_conditions, dtype_name
from launch.run.results import (
    RESULTS,
    Prediction,
    RunFacts,
    RunResults,
    Score,
    SmallExport,
    runs_table,
    write_results,
)
from launch.runtime import watchdog
from launch.runtime.base_model import check_token_ids, read_config
from launch.runtime.distributed import (
    all_reduce_max,
    print_rank0,
    run_on_rank0,
    start_process_group,
    stop_process_group,
    try_or_say,
)
from launch.runtime.entry import describe_failure
from launch.runtime.errors import DivergedError, UserError
from launch.runtime.locks import FolderLock
from launch.runtime.model_files import load_tokenizer
from launch.scoring.held_out import (
    count_trained_parameters,
    gather_peak_memory,
    measure_predictions,
    read_other_text,
)
from launch.scoring.score import read_problems, score_benchmarks
from launch.training.checkpoint import (
    Checkpoint,
    CheckpointStore,
    make_initial_reader,
    restore_training,
)
from launch.training.export import read_plain_rank
from launch.training.flops import count_training_flops, find_peak_flops
from launch.training.kernels import (
    apply_kernels,
    choose_packing,
    compile_layers,
    require_kernels,
    require_packing,
    uncompile_layers,
)
from launch.training.loop import describe_low_rates, make_train_state, train
from launch.training.loss import in_bf16
from launch.training.merged_export import describe_merged, save_merged
from launch.training.metrics_log import log_steps
from launch.training.model_card import render_model_card
from launch.training.model_export import describe_weights
from launch.training.profiling import profile_steps
from launch.training.rehearsal import (
    describe_unreached,
    find_unreached_adapters,
    refuse_unsaveable,
    require_space,
)
from launch.training.small_export import save_small_lora, without_products
from launch.training.trackers import open_trackers, require_trackers
from launch.training.trainable import (
    as_base,
    attach_trainable,
    choose_smallest,
    describe_trainable,
    draw_new_weights,
    export_trained,
    find_lora_layers,
    find_trained_parameters,
)

CALIBRATION = "calibration"  # folder in the run folder


@dataclass(frozen=True)
class PreparedRun:
    """What the first stage reads and decides.

    It is the same on every rank, except for the folder in inputs.model, which is local to a node.
    """

    name: str  # the recipe's name
    model_name: str  # the base as the recipe names it
    recipe: Recipe  # with local paths in the place of `quickstart`
    folder: Path  # the run folder
    inputs: Inputs  # the base's folder and the training examples
    tokenizer: PreTrainedTokenizerBase
    problems: dict[str, list[Problem]]  # benchmark -> its questions
    measured: dict[str, TokenSet]  # sets whose loss is measured before and after training
    other_text_source: dict | None  # path and hash of the text on which forgetting is measured
    steps: list[list[int]]  # for each optimiser step, its examples, over all ranks
    checkpoints: CheckpointStore
    saved: Checkpoint | None  # the checkpoint to resume from
    decided: dict[str, Any]  # recipe field that was `auto` -> its value in `recipe`


@dataclass(frozen=True)
class RunModel:
    """The model that is trained, in its engine."""

    engine: Engine
    base: PreTrainedModel
    model: nn.Module  # the base with adapters, or the base itself
    lora_layers: dict[str, LoraLayer]  # module name -> PEFT layer; empty if all is trained


@dataclass(frozen=True)
class BaseMeasurements:
    """What is measured on the untouched base, before it is initialised."""

    calibration: Path | None  # folder of the calibration; None where the method needs none
    logits: Tensor  # of one training example of this rank
    before: dict[str, Prediction]  # measured set -> the base's prediction
    baseline: dict[str, Score]  # benchmark -> the base's score


def fine_tune(
    recipe: Recipe,
    name: str,
    folder: Path,
    stall: float,
    profile: bool = False,
    peak_tflops: float | None = None,
) -> None:
    """Run `recipe` into the run folder. Every rank of a launcher calls it.

    Started again on the same folder, it resumes from the newest whole checkpoint.

    Args:
        name: the recipe's name, for the results.
        stall: seconds without progress after which the run is ended.
        profile: whether to record a few steps (launch.training.profiling).
        peak_tflops: peak TFLOP/s of one device, in the place of launch.training.flops' table.
    """
    device = start_process_group(stall)
    world_size = dist.get_world_size()
    if recipe.engine == "single" and world_size > 1:
        raise UserError(
            f"engine: single trains in one process, not {world_size}; set engine=zero3 or start "
            "one rank"
        )
    lock = FolderLock(folder)
    is_finished = run_on_rank0(lambda: open_run(folder, recipe, lock))
    if is_finished:
        print_rank0(f"{folder} holds this run, finished; see {folder / RESULTS}")
    else:
        # For a request to stop outside of training; `run_stages` handles one during it.
        watchdog.on_preempted(lambda: write_state(folder, "preempted"))
        watchdog.on_error(lambda line, code: write_state(folder, "error", line, code))
        try:
            run_stages(recipe, name, folder, device, profile, peak_tflops)
        except Exception as error:  # of every kind: state.json is to tell how the run ended
            line, code = describe_failure(error)
            if dist.get_rank() == 0:
                state = "diverged" if isinstance(error, DivergedError) else "error"
                with contextlib.suppress(OSError):  # of a full disk: the user is to see `error`
                    write_state(folder, state, line, code)
            raise
    stop_process_group()


def run_stages(
    recipe: Recipe,
    name: str,
    folder: Path,
    device: torch.device,
    profile: bool = False,
    peak_tflops: float | None = None,
) -> None:
    """Run the stages of a run in an opened run folder. Collective; see `fine_tune`."""
    run = prepare_run(recipe, name, folder, device)
    loaded = load_run_model(run, device)
    if run.saved is None:
        facts, history = initialise_run(run, loaded), []
    else:
        facts, history = restore_run(run, loaded), run.saved.history
    # A0 and B0 by module name, on rank 0; empty on the other ranks.
    initial = read_factors(loaded.lora_layers, loaded.engine)
    if run.saved is None:
        # A run that is killed before its first checkpoint need not calibrate or score again.
        save_checkpoint(run, loaded, None, initial, facts, history)
    peak_flops = find_peak_flops(device, run.inputs.dtype)
    if peak_tflops is not None:
        peak_flops = peak_tflops * 1e12
    train_model(run, loaded, initial, facts, history, profile, peak_flops)
    if len(history) < len(run.steps):
        run_on_rank0(lambda: write_state(folder, "preempted"))
        print_rank0(
            f"stopped after step {len(history)} of {len(run.steps)}, saved; the same command "
            "resumes from there"
        )
        return
    exported = export_run(run, loaded, initial, history)
    scores = score_run(run, loaded, "scoring", f"after step {len(run.steps)}", folder)
    after = measure_predictions(loaded.engine, loaded.model, run.measured)
    small = export_small(run, loaded, initial)
    results = make_results(run, loaded, facts, history, scores, after, small, peak_flops)
    run_on_rank0(lambda: write_run_results(run, results))
    if dist.get_rank() == 0:
        print_rank0(runs_table([folder]))
    print_rank0(f"plots: {folder / 'loss.png'} {folder / 'grad_norm.png'}  to load: {exported}")


def prepare_run(recipe: Recipe, name: str, folder: Path, device: torch.device) -> PreparedRun:
    """Read, check and prepare all that a run starts from. Collective.

    Errors in the inputs are raised here, before the model is loaded. Of the quickstart the base is
    pretrained first, if it is not cached.
    """
    watchdog.set_phase("reading the inputs")
    model_name, settings = recipe.model.name, recipe.train
    require_trackers(recipe.tracking)
    require_kernels(recipe, device, resolve_dtype(recipe.model.dtype, device))
    recipe = resolve_quickstart(recipe, device)
    inputs = prepare_inputs(recipe, device)
    check_samples(recipe, inputs)
    tokens, tokenizer = inputs.tokens, load_tokenizer(inputs.model_path)
    problems = read_problems(recipe.eval)
    measured, other_text_source = _read_measured_sets(recipe, inputs, tokenizer)
    checkpoints = CheckpointStore(folder, settings.keep)
    saved = run_on_rank0(lambda: _find_checkpoint(checkpoints, inputs))
    steps = plan_steps(
        len(tokens), settings.global_batch, settings.epochs, settings.max_steps, settings.seed
    )
    steps = list(steps)
    print_rank0(
        run_on_rank0(lambda: describe_trainable(read_config(inputs.model_path), recipe.adapter))
    )
    _print_rows(recipe, inputs, steps)
    low_rates = describe_low_rates(len(steps), settings)
    if low_rates is not None:
        print_rank0(low_rates)
    decided = {}
    if saved is None:  # else the calibration is done
        recipe, decided = decide_memory(recipe, inputs, device, folder / CALIBRATION)
    return PreparedRun(
        name=name,
        model_name=model_name,
        recipe=recipe,
        folder=folder,
        inputs=inputs,
        tokenizer=tokenizer,
        problems=problems,
        measured=measured,
        other_text_source=other_text_source,
        steps=steps,
        checkpoints=checkpoints,
        saved=saved,
        decided=decided,
    )


def _print_rows(recipe: Recipe, inputs: Inputs, steps: list[list[int]]) -> None:
    """Print what is trained on, and what about it may surprise."""
    tokens, world_size = inputs.tokens, dist.get_world_size()
    dropped = "".join(f"; {count} {reason}" for reason, count in inputs.data["dropped"].items())
    print_rank0(
        f"{len(tokens)} rows ({tokens.num_truncated} cut at {recipe.data.max_length} tokens, "
        f"{tokens.num_dropped} dropped{dropped}), {len(steps)} steps of "
        f"{recipe.train.global_batch} rows on {world_size} ranks, micro batch "
        f"{recipe.train.micro_batch}"
    )
    if tokens.num_special:
        print_rank0(
            f"{tokens.num_special} rows hold text that became special tokens, since this tokenizer "
            "cannot take it for text; launch/prepare.py names the first"
        )
    idle = describe_idle_ranks(steps, world_size)
    if idle is not None:
        print_rank0(idle)


def _read_measured_sets(
    recipe: Recipe, inputs: Inputs, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, TokenSet], dict | None]:
    """Return the sets whose loss is measured, by name, and where the other text is from.

    Collective.
    """
    measured = {}
    if inputs.held_out is not None:
        measured["held_out"] = inputs.held_out
    if recipe.eval.other_text is None:
        return measured, None
    path = Path(recipe.eval.other_text).expanduser()
    text, source = run_on_rank0(lambda: read_other_text(path, tokenizer, recipe.data.max_length))
    largest = int(text.tokens.max())
    check_token_ids(largest, inputs.model.num_embeddings, tokenizer, "eval.other_text")
    measured["other_text"] = text
    return measured, source


def _find_checkpoint(checkpoints: CheckpointStore, inputs: Inputs) -> Checkpoint | None:
    """Return the newest intact checkpoint.

    Raises UserError if it is of another base or of other examples.
    """
    saved = checkpoints.find_newest()
    if saved is None:
        return None
    for field, content in _get_input_hashes(inputs).items():
        if saved.facts["inputs"][field] != content:
            raise UserError(
                f"{field}: its content is not what this run began with ({saved.folder}); bring "
                "that back, or choose another --output"
            )
    return saved


def _get_input_hashes(inputs: Inputs) -> dict[str, str]:
    """Return the hashes of the base and the examples, by the recipe fields that name them."""
    return {
        "model.name": inputs.base["weights_sha256"],
        "data.path": inputs.data["tokens_sha256"],
    }


def load_run_model(run: PreparedRun, device: torch.device) -> RunModel:
    """Load the base, already sharded, and put PEFT's layers at its targets. Collective.

    With `fsdp` the weights have no values yet: the next stage materializes them.
    """
    watchdog.set_phase("loading the base")
    recipe = run.recipe
    if run.saved is not None:
        lora_ranks = RunFacts.model_validate(run.saved.facts).ranks
    else:
        lora_ranks = _allocate_lora_ranks(run, device)
    engine = make_engine(recipe.engine, device, run.inputs.dtype)
    base = engine.load_model(run.inputs.model, full=recipe.adapter.method_record.trains_all)
    apply_kernels(base, recipe)
    base.register_forward_pre_hook(lambda *_: watchdog.heartbeat())
    model = attach_trainable(base, recipe.adapter, lora_ranks)
    return RunModel(engine, base, model, find_lora_layers(model))


def _allocate_lora_ranks(run: PreparedRun, device: torch.device) -> dict[str, int] | None:
    """Return the ranks that follow from a calibration; None if all are alike. Collective.

    The calibration is then made first, on a base of its own: the ranks must be known before the
    adapters are attached, and FSDP2 cannot take in adapters once the base is sharded.
    """
    recipe = run.recipe
    if recipe.adapter.rank_allocation == "uniform":
        return None
    path = recipe.calibration.path
    source = Path(path).expanduser() if path else run.folder / CALIBRATION
    engine = make_engine(recipe.engine, device, run.inputs.dtype)
    calibrate_base(recipe, run.inputs, engine, source)
    return allocate_lora_ranks(recipe, source)


def initialise_run(run: PreparedRun, loaded: RunModel) -> RunFacts:
    """Calibrate and measure the untouched base, then set A0, B0 and W_res. Collective."""
    loaded.engine.materialize(loaded.model)
    draw_new_weights(loaded.base, run.inputs.model, run.recipe.train.seed, loaded.engine)
    measured = _measure_base(run, loaded)
    watchdog.set_phase("initialisation")
    ranks = {name: layer.r[ADAPTER] for name, layer in loaded.lora_layers.items()}
    make_factors = make_factor_source(run.recipe, measured.calibration, ranks, loaded.engine.device)
    rounding = initialise_layers(loaded.lora_layers, make_factors, loaded.engine)
    drift = _measure_drift(run, loaded, measured.logits)
    print_rank0(
        f"step 0: logits moved by at most {drift:.1e} of their largest, weights by {rounding:.1e} "
        "of their norm"
    )
    seconds = 0.0
    if measured.calibration is not None:
        seconds = run_on_rank0(lambda: read_seconds(measured.calibration))
    return RunFacts(
        ranks=ranks if run.recipe.adapter.rank_allocation != "uniform" else None,
        inputs=_get_input_hashes(run.inputs),
        calibration_seconds=seconds,
        decided=run.decided,
        logit_drift=drift,
        residual_rounding=rounding,
        baseline=measured.baseline,
        before=measured.before,
    )


def _measure_base(run: PreparedRun, loaded: RunModel) -> BaseMeasurements:
    """Calibrate the untouched base, measure its losses and score it if asked. Collective."""
    engine, model = loaded.engine, loaded.model
    baseline: dict[str, Score] = {}
    with engine.inference_mode(model), as_base(model):
        calibration = obtain_calibration(
            run.recipe,
            run.inputs,
            engine,
            model,
            get_base_layers(loaded.lora_layers),
            run.folder / CALIBRATION,
        )
        logits = _compute_probe_logits(run, loaded)
        before = measure_predictions(engine, model, run.measured)
        if run.recipe.eval.baseline:
            baseline = score_run(run, loaded, "scoring the base", None, run.folder / "baseline")
    return BaseMeasurements(calibration, logits, before, baseline)


def _measure_drift(run: PreparedRun, loaded: RunModel, base_logits: Tensor) -> float:
    """Measure how far initialisation moved the outputs, relative to the largest logit. Collective.

    s B0 A0 is subtracted from W and added again by the adapter, so only rounding moves them. The
    drift is recorded in the results.
    """
    with loaded.engine.inference_mode(loaded.model):
        change = _compute_probe_logits(run, loaded) - base_logits
    drift = change.abs().max() / base_logits.abs().max()
    return all_reduce_max(drift.item(), loaded.engine.device)


@torch.no_grad()
def _compute_probe_logits(run: PreparedRun, loaded: RunModel) -> Tensor:
    """Compute the logits of one training example of this rank, (1, tokens, vocabulary), fp32.

    Collective where the model is sharded.
    """
    tokens = run.inputs.tokens
    example = dist.get_rank() % len(tokens)
    batch, _ = collate_examples(tokens, [example], loaded.engine.device)
    return loaded.model(input_ids=batch["input_ids"], use_cache=False).logits.float()


def restore_run(run: PreparedRun, loaded: RunModel) -> RunFacts:
    """Write the checkpoint's A0 and B0 into the adapters, and rebuild W_res from them. Collective.

    The trained values are restored with the optimiser, in `train_model`.
    """
    print_rank0(
        f"resuming after step {run.saved.step} of {len(run.steps)}, from {run.saved.folder}"
    )
    loaded.engine.materialize(loaded.model)
    read_initial = make_initial_reader(run.saved, loaded.engine.device)
    initialise_layers(loaded.lora_layers, read_initial, loaded.engine)
    return RunFacts.model_validate(run.saved.facts)


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
            smallest = choose_smallest(loaded.lora_layers)
            _save_small(run, loaded, smallest, initial, checkpoint.folder, keep_dropped=False)
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
    history: list[Metrics],
    profile: bool,
    peak_flops: float | None,
) -> None:
    """Train from the last step of `history` on, and add the new ones to it. Collective.

    Ends early when a rank is asked to stop. A checkpoint is saved on the way and at the end.
    """
    recipe, settings = run.recipe, run.recipe.train
    engine, model, total = loaded.engine, loaded.model, len(run.steps)
    num_done = len(history)
    if recipe.data.packing:
        require_packing(engine, model)
    if _wants_gradient_checkpointing(recipe, engine.device):
        model.gradient_checkpointing_enable({"use_reentrant": engine.reentrant})
    compiled = compile_layers(loaded.base) if settings.compile else []
    state = make_train_state(engine, model, settings)
    if run.saved is not None:
        restore_training(run.saved, find_trained_parameters(model), state, engine.device)
    watchdog.set_phase("training", timed=True, in_steps=True)
    training = train(
        state,
        run.inputs.tokens,
        run.steps,
        settings,
        engine.device,
        history=tuple(history),  # a copy: the loop below appends to it
        packing=choose_packing(recipe, loaded.base),
        flop_counts=count_training_flops(loaded.base),
        peak_flops=peak_flops,
    )
    if profile:
        training = profile_steps(training, total - num_done, run.folder, dist.get_rank())
    last_saved = num_done
    with open_trackers(recipe, run.folder, num_done) as log, in_bf16(model):
        rank, earlier = dist.get_rank(), tuple(history)
        for metrics in log_steps(training, earlier, total, run.folder, rank, log):
            history.append(metrics)
            step = metrics["step"]
            if step == num_done + 1:
                rehearse_saves(run, loaded, state, initial, facts, history)
            if step % settings.checkpoint_every == 0 and step < total:
                save_checkpoint(run, loaded, state, initial, facts, history)
                last_saved = step
    if len(history) != last_saved:
        save_checkpoint(run, loaded, state, initial, facts, history)
    model.gradient_checkpointing_disable()
    uncompile_layers(compiled)


def _wants_gradient_checkpointing(recipe: Recipe, device: torch.device) -> bool:
    """Return whether activations are recomputed in the backward pass; auto: on GPUs."""
    wanted = recipe.train.gradient_checkpointing
    return device.type == "cuda" if wanted == "auto" else wanted


def export_run(
    run: PreparedRun, loaded: RunModel, initial: dict[str, Factors], history: list[Metrics]
) -> Path:
    """Write what was trained, merged too if asked for, and plots of its training. Collective.

    Returns:
        The folder that users load.
    """
    watchdog.set_phase("exporting")
    exported = export_trained(run.folder, loaded.model, loaded.engine, run.inputs, initial)
    if run.recipe.export.merged:
        save_merged(run.folder, loaded.model, loaded.engine, run.inputs)
    # Nothing depends on the plots: the run is not to fail for them after its training.
    run_on_rank0(
        lambda: try_or_say("the plots", lambda: plot_runs({run.folder.name: history}, run.folder))
    )
    return exported


def export_small(
    run: PreparedRun, loaded: RunModel, initial: dict[str, Factors]
) -> SmallExport | None:
    """Write lora_small/ if the recipe asks for it, and measure its held-out loss. Collective."""
    if run.recipe.export.rank is None:
        return None
    watchdog.set_phase("exporting lora_small")
    held_out = {name: tokens for name, tokens in run.measured.items() if name == "held_out"}
    small, dropped = _save_small(
        run, loaded, loaded.lora_layers, initial, run.folder, keep_dropped=bool(held_out)
    )
    if held_out:
        with without_products(loaded.lora_layers, dropped, loaded.engine.device):
            measured = measure_predictions(loaded.engine, loaded.model, held_out)
        small = small.model_copy(update=measured)
    return small


def _save_small(
    run: PreparedRun,
    loaded: RunModel,
    layers: dict[str, LoraLayer],
    initial: dict[str, Factors],
    folder: Path,
    keep_dropped: bool,
) -> tuple[SmallExport, dict[str, Factors]]:
    """Write lora_small/ of `layers` into `folder`; see `save_small_lora`. Collective."""
    return save_small_lora(
        folder,
        layers,
        loaded.engine,
        loaded.model.peft_config[ADAPTER],
        run.inputs.base,
        initial,
        run.recipe.export.rank,
        keep_dropped,
    )


def score_run(
    run: PreparedRun, loaded: RunModel, phase: str, adapter: str | None, folder: Path
) -> dict[str, Score]:
    """Score the model, as it is, on the recipe's benchmarks. Collective.

    Args:
        phase: the watchdog's name for it.
        adapter: label of what is scored; kept responses with another label are not reused.
        folder: where responses are kept.
    """
    watchdog.set_phase(phase, timed=True)
    identity = {
        "base": run.inputs.base,
        "adapter": adapter,
        "dtype": dtype_name(run.inputs.dtype),
    }
    return score_benchmarks(
        loaded.engine,
        loaded.model,
        run.tokenizer,
        run.problems,
        run.recipe.eval,
        folder,
        identity,
    )


def make_results(
    run: PreparedRun,
    loaded: RunModel,
    facts: RunFacts,
    history: list[Metrics],
    scores: dict[str, Score],
    after: dict[str, Prediction],
    small: SmallExport | None,
    peak_flops: float | None,
) -> RunResults:
    """Return the run's record, with the conditions that its numbers hold for. Collective.

    Args:
        after: measured set -> the trained model's prediction.
        small: of lora_small/; None where it was not asked for.
    """
    recipe, adapter, device = run.recipe, run.recipe.adapter, loaded.engine.device
    has_adapters = bool(loaded.lora_layers)
    has_eigen_select = adapter.method_record.variant == "eigen_select"
    conditions = describe_conditions(dist.get_world_size(), device)
    conditions["peak_tflops"] = peak_flops and peak_flops / 1e12
    # held_out and other_text are left out where they were not measured.
    measured = {name: {"before": facts.before[name], "after": after[name]} for name in after}
    if small is not None:
        measured["small"] = small
    return RunResults(
        recipe=run.name,
        model=run.model_name,
        base=run.inputs.base,
        data=run.inputs.data,
        method=adapter.method,
        variant=recipe.variant,
        eigen_select=adapter.eigen_select if has_eigen_select else None,
        rank=adapter.rank if has_adapters else None,
        lora_rank=run_on_rank0(lambda: read_plain_rank(run.folder)),
        alpha=adapter.alpha if has_adapters else None,
        lr=recipe.train.lr,
        seed=recipe.train.seed,
        steps=len(run.steps),
        final_loss=history[-1]["loss"],
        **measured,
        **({"decided": facts.decided} if facts.decided else {}),
        other_text_source=run.other_text_source,
        trained_parameters=count_trained_parameters(loaded.model),
        peak_memory=gather_peak_memory(device),
        logit_drift=facts.logit_drift,
        residual_rounding=facts.residual_rounding,
        engine=recipe.engine,
        dtype=dtype_name(run.inputs.dtype),
        seconds={"calibration": facts.calibration_seconds, "training": history[-1]["seconds"]},
        baseline=facts.baseline,
        scores=scores,
        conditions=conditions,
    )


def write_run_results(run: PreparedRun, results: RunResults) -> None:
    """Write the model card and results.json. Rank 0 calls it.

    A model card that fails is said and left out. results.json comes after everything else: that it
    is there marks the run as finished. state.json only repeats that.
    """

    def write_card() -> None:
        card = render_model_card(run.folder, run.recipe, results)
        (run.folder / "README.md").write_text(card, encoding="utf-8")

    try_or_say("the model card", write_card)
    write_results(run.folder, results)
    write_state(run.folder, "finished")
