"""Load the base with its adapters, and set their values: from a calibration or a checkpoint."""

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor

from astra.adapter import ADAPTER, get_base_layers, initialise_layers
from launch.calibration.batches import describe_calibration_data
from launch.calibration.run import (
    allocate_lora_ranks,
    calibrate_base,
    find_calibration,
    make_factor_source,
    obtain_calibration,
)
from launch.calibration.store import read_seconds
from launch.config.schema import Eval, Recipe
from launch.data.batches import make_model_inputs
from launch.data.inputs import Inputs
from launch.engines import make_engine
from launch.run.folder import BASELINE
from launch.run.results import RunFacts, Score, describe_source
from launch.runtime import watchdog
from launch.runtime.distributed import all_reduce_max, print_rank0, run_on_rank0
from launch.scoring.held_out import measure_predictions
from launch.stages.records import (
    CALIBRATION,
    BaseMeasurements,
    PreparedRun,
    RunModel,
    identify_inputs,
)
from launch.stages.score import score_run
from launch.training.checkpoint import make_initial_reader
from launch.training.kernels import apply_kernels
from launch.training.trainable import as_base, attach_trainable, draw_new_weights, find_lora_layers


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
    engine = make_engine(recipe.engine, device, run.inputs.dtype, recipe.shard_within)
    base = engine.load_model(run.inputs.model, full=recipe.adapter.method_record.trains_all)
    apply_kernels(base, recipe)
    watchdog.beat_on_forward(base)
    model = attach_trainable(base, recipe.adapter, lora_ranks, run.inputs.model.head_parameters)
    return RunModel(engine, base, model, find_lora_layers(model))


def _allocate_lora_ranks(run: PreparedRun, device: torch.device) -> dict[str, int] | None:
    """Return the ranks that follow from a calibration; None if all are alike. Collective.

    The calibration is then made first, on a base of its own: the ranks must be known before the
    adapters are attached, and FSDP2 cannot take in adapters once the base is sharded.
    """
    recipe = run.recipe
    if recipe.adapter.rank_allocation == "uniform":
        return None
    folder = run.folder / CALIBRATION
    source = find_calibration(recipe, run.inputs, folder)
    if source is None:
        calibrate_base(recipe, run.inputs, device, folder)
        source = folder
    return allocate_lora_ranks(recipe, source)


def initialise_run(run: PreparedRun, loaded: RunModel) -> RunFacts:
    """Calibrate and measure the untouched base, then set A0, B0 and W_res. Collective."""
    rounded_start = describe_rounded_start(run.recipe, run.inputs)
    if rounded_start is not None:
        print_rank0(rounded_start)
    loaded.engine.materialize(loaded.model)
    draw_new_weights(loaded.base, run.inputs.model, run.recipe.train.seed, loaded.engine)
    measured = _measure_base(run, loaded)
    watchdog.set_phase("initialisation")
    ranks = {name: layer.r[ADAPTER] for name, layer in loaded.lora_layers.items()}
    make_factors = make_factor_source(run.recipe, measured.calibration, ranks, loaded.engine.device)
    rounding = initialise_layers(loaded.lora_layers, make_factors, loaded.engine)
    data = describe_calibration_data(run.recipe, run.inputs)
    if loaded.lora_layers:
        print_rank0(f"initial factors: {run.recipe.label}, from {describe_source(data)}")
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
        inputs=identify_inputs(run.inputs, run.other_text_source),
        calibration_seconds=seconds,
        calibration_data=data,
        decided=run.decided,
        logit_drift=drift,
        residual_rounding=rounding,
        baseline=measured.baseline,
        before=measured.before,
    )


def describe_rounded_start(recipe: Recipe, inputs: Inputs) -> str | None:
    """Say where full fine-tuning starts from rounded weights; None where it does not.

    DeepSpeed makes the fp32 weights that AdamW steps from the model, which it holds in bfloat16.
    The other engines make them from the files.
    """
    is_full = recipe.adapter.method_record.trains_all and recipe.engine.startswith("zero")
    more_exact = sorted(inputs.model.dtypes - {"BF16"})
    if not (is_full and inputs.dtype == torch.bfloat16 and more_exact):
        return None
    return (
        f"engine: {recipe.engine} begins with the weights rounded to bfloat16, though the files hold "
        f"{', '.join(more_exact)}; single and fsdp begin with the files' own"
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
            watchdog.set_phase("scoring the base", timed=True)
            settings, folder = run.recipe.eval, run.folder / BASELINE
            baseline = score_run(run, loaded, run.problems, settings, None, folder)
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
    """Compute the logits of one training example of this rank, fp32.

    They are (1, tokens, vocabulary), or (1, outputs) of a new head.

    Collective where the model is sharded.
    """
    tokens = run.inputs.tokens
    example = dist.get_rank() % len(tokens)
    inputs = make_model_inputs(tokens, [example], loaded.engine.device)
    return loaded.model(**inputs).logits.float()


def restore_run(run: PreparedRun, loaded: RunModel) -> RunFacts:
    """Write the checkpoint's A0 and B0 into the adapters, and rebuild W_res from them. Collective.

    The trained values are restored with the optimiser, in `train_model`.
    """
    print_rank0(
        f"resuming after step {run.saved.step} of {len(run.steps)}, from {run.saved.folder}"
    )
    loaded.engine.materialize(loaded.model)
    draw_new_weights(loaded.base, run.inputs.model, run.recipe.train.seed, loaded.engine)
    read_initial = make_initial_reader(run.saved, loaded.engine.device)
    initialise_layers(loaded.lora_layers, read_initial, loaded.engine)
    facts = RunFacts.model_validate(run.saved.facts)
    unscored = describe_unscored_base(run.recipe.eval, run.problems, facts.baseline)
    if unscored is not None:
        print_rank0(unscored)
    if run.decided == facts.decided:
        return facts
    return facts.model_copy(update={"decided": run.decided})


def describe_unscored_base(
    settings: Eval, benchmarks: Collection[str], baseline: Collection[str]
) -> str | None:
    """Name the benchmarks that a resumed run was given too late to score the base on them.

    Args:
        benchmarks: to be scored after training.
        baseline: on which the base was scored before training.

    Returns:
        None if there are none, or the base is not to be scored.
    """
    missing = [name for name in benchmarks if name not in baseline]
    if not (settings.baseline and missing):
        return None
    return (
        f"eval.baseline: the base is not scored on {', '.join(missing)}, which eval.suites did not "
        "have before training"
    )
