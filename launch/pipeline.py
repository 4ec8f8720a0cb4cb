"""The main path of a fine-tuning run, stage by stage."""

import contextlib
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedTokenizerBase

from astra import adapter
from launch.calibration import run as calibration
from launch.calibration import store as artifact
from launch.config.schema import Recipe
from launch.data.batches import packing_of
from launch.data.inputs import Inputs, prepare, resolve_dtype
from launch.data.tokenize import TokenSet, num_steps, step_rows
from launch.engines import Engine, make_engine
from launch.methods import registry as methods
from launch.methods import trainable
from launch.report import table
from launch.run import plots as figures
from launch.run.folder import open_run, write_state
from launch.runtime import watchdog as watch
from launch.runtime.distributed import all_reduce_max, on_rank0, say, start, stop
from launch.runtime.errors import USER_ERRORS, DivergedError, UserError
from launch.runtime.files import write_json
from launch.runtime.model_files import load_tokenizer
from launch.scoring import held_out as measure
from launch.scoring.score import read_problems, score
from launch.training import checkpoint, export, kernels, trackers
from launch.training import metrics_log as tracking
from launch.training.flops import device_peak, work_of
from launch.training.loop import make_stepper, train
from launch.training.profiling import profiled


def fine_tune(
    recipe: Recipe,
    name: str,
    folder: Path,
    stall: float,
    profile: bool = False,
    peak_tflops: float | None = None,
) -> None:
    """Run `recipe`, called `name` in the results, into the run folder. Every rank of a launcher calls it.

    Started again on the same folder it goes on from the newest whole checkpoint.

    Args:
        profile: record a few steps (launch.training.profiling).
        peak_tflops: of a device, where launch.training.flops does not know.
    """
    device = start(stall)
    world_size = dist.get_world_size()
    if recipe.engine == "single" and world_size > 1:
        raise UserError(
            f"engine: single trains in one process, not {world_size}; set engine=zero3 or start one rank"
        )
    if on_rank0(lambda: open_run(folder, recipe)):
        say(f"{folder} holds this run, finished; see {folder / 'results.json'}")
    else:
        watch.on_preempted(lambda: write_state(folder, "preempted"))
        try:
            run_stages(recipe, name, folder, device, profile, peak_tflops)
        except USER_ERRORS as error:
            if dist.get_rank() == 0:
                with contextlib.suppress(
                    OSError
                ):  # a full disk, say: the error itself is what the user is to see
                    write_state(folder, "diverged" if isinstance(error, DivergedError) else "error")
            raise
    stop()


def run_stages(
    recipe: Recipe,
    name: str,
    folder: Path,
    device: torch.device,
    profile: bool = False,
    peak_tflops: float | None = None,
) -> None:
    """The stages of a run, in a started process group and an opened run folder. Collective; see `fine_tune`."""
    rank, world_size = dist.get_rank(), dist.get_world_size()

    # 1. A local model folder, tokens, problems. What is wrong with them shows before anything long starts.
    model_name, settings = recipe.model.name, recipe.train
    watch.stage("reading the inputs")
    trackers.require(recipe.tracking)
    kernels.require(recipe, device, resolve_dtype(recipe.model.dtype, device))
    inputs = prepare(recipe, device)
    recipe, tokens = inputs.recipe, inputs.tokens  # the quickstart's paths in the place of its name
    tokenizer = load_tokenizer(inputs.model_path)
    problems = read_problems(recipe.eval)
    measured, other_text = _measured(recipe, inputs, tokenizer)
    saved = on_rank0(lambda: _resumable(folder, inputs))
    total = num_steps(len(tokens), settings.global_batch, settings.epochs, settings.max_steps)
    steps = list(
        step_rows(
            len(tokens), settings.global_batch, settings.epochs, settings.max_steps, settings.seed
        )
    )
    dropped = "".join(f"; {count} {reason}" for reason, count in inputs.data["dropped"].items())
    say(
        f"{len(tokens)} rows ({tokens.num_cut} cut at {recipe.data.max_length} tokens, "
        f"{tokens.num_left_out} dropped{dropped}), "
        f"{total} steps of {settings.global_batch} rows on {world_size} ranks, micro batch {settings.micro_batch}"
    )

    # 2. The base model, already sharded, with PEFT's layers at the targets (none for full fine-tuning).
    watch.stage("loading the base")
    wanted = recipe.adapter
    ranks = saved.facts["ranks"] if saved else _allocated_ranks(recipe, inputs, device, folder)
    engine = make_engine(recipe.engine, device, inputs.dtype)
    base = engine.load(str(inputs.model_path), full=wanted.method == "full")
    kernels.put_in(base, recipe)
    base.register_forward_pre_hook(lambda *_: watch.mark())
    model = trainable.attach(base, wanted, ranks)
    layers = trainable.layers(model)

    # 3. A0, B0 and W_res into the sharded model: from a calibration, or as a checkpoint has them.
    if saved is None:
        facts = _initialise(
            recipe, inputs, engine, model, layers, tokenizer, problems, measured, folder
        )
        history = []
    else:
        say(f"going on after step {saved.step} of {total}, from {saved.folder}")
        with engine.inference(model):  # FSDP2 shards and loads the base here
            pass
        adapter.initialise(layers, checkpoint.initial(saved, device), engine)
        facts, history = saved.facts, saved.history
    initial = adapter.read_factors(layers, engine)
    parameters = trainable.parameters(model)
    if saved is None:
        checkpoint.save(folder, 0, parameters, initial, None, facts, history, settings.keep)

    # 4. Train.
    if recipe.data.packing:
        kernels.require_packing(engine, model)
    if settings.gradient_checkpointing is True or (
        settings.gradient_checkpointing == "auto" and device.type == "cuda"
    ):
        model.enable_input_require_grads()  # the reentrant form needs an input with a gradient
        model.gradient_checkpointing_enable({"use_reentrant": engine.reentrant})
    compiled = kernels.compile_layers(base) if settings.compile else []
    stepper = make_stepper(engine, model, settings)
    if saved is not None:
        checkpoint.restore(saved, parameters, stepper, device)
    watch.stage("training", timed=True, in_steps=True)
    peak = peak_tflops * 1e12 if peak_tflops else device_peak(device, inputs.dtype)
    training = train(
        stepper,
        tokens,
        steps,
        settings,
        device,
        history,
        packing_of(recipe, base),
        work_of(base),
        peak,
    )
    if profile:
        training = profiled(training, total - len(history), folder, rank)
    with trackers.opened(recipe, folder, len(history)) as log:
        for metrics in tracking.track(training, list(history), total, folder, rank, log):
            history.append(metrics)
            step = metrics["step"]
            if step % settings.checkpoint_every == 0 and step < total:
                checkpoint.save(
                    folder, step, parameters, initial, stepper, facts, history, settings.keep
                )
    done = len(history)
    if saved is None or done > saved.step:
        checkpoint.save(folder, done, parameters, initial, stepper, facts, history, settings.keep)
    if done < total:
        on_rank0(lambda: write_state(folder, "preempted"))
        say(f"stopped after step {done} of {total}, saved; the same command goes on from there")
        return
    model.gradient_checkpointing_disable()
    kernels.uncompile(compiled)

    # 5. Export, then score.
    watch.stage("exporting")
    exported = trainable.export(folder, model, engine, inputs, initial)
    on_rank0(lambda: figures.plot({folder.name: history}, folder))
    watch.stage("scoring", timed=True)
    made_by = {
        "base": inputs.base,
        "adapter": f"after step {total}",
        "dtype": export.dtype_name(inputs.dtype),
    }
    scores = score(engine, model, tokenizer, problems, recipe.eval, folder, made_by)
    after = measure.predictions(engine, model, measured)
    memory, trained = measure.peak_memory(device), measure.trained_parameters(model)

    # 6. One results row, with the conditions its numbers hold for; written last, it marks the run as finished.
    def finish() -> None:
        results = {
            "recipe": name,
            "model": model_name,
            "base": inputs.base,
            "data": inputs.data,
            "method": wanted.method,
            "variant": methods.variant(recipe),
            "eigen_select": wanted.eigen_select if wanted.method == "astra" else None,
            "rank": wanted.rank if layers else None,
            "lora_rank": export.plain_rank(folder),
            "alpha": wanted.alpha if layers else None,
            "lr": settings.lr,
            "seed": settings.seed,
            "steps": total,
            "final_loss": history[-1]["loss"],
            **{name: {"before": facts["before"][name], "after": after[name]} for name in measured},
            "other_text_source": other_text,
            "trained_parameters": trained,
            "peak_memory": memory,
            "logit_drift": facts["logit_drift"],
            "residual_rounding": facts["residual_rounding"],
            "engine": recipe.engine,
            "dtype": export.dtype_name(inputs.dtype),
            "seconds": {
                "calibration": facts["calibration_seconds"],
                "training": history[-1]["seconds"],
            },
            "baseline": facts["baseline"],
            "scores": scores,
            "conditions": tracking.conditions(world_size, device)
            | {"peak_tflops": peak and peak / 1e12},
        }
        (folder / "README.md").write_text(export.model_card(folder, recipe, results))
        write_json(folder / "results.json", results)
        write_state(folder, "finished")

    on_rank0(finish)
    if rank == 0:
        say(table([folder]))
    say(f"plots: {folder / 'loss.png'} {folder / 'grad_norm.png'}  to load: {exported}")


def _measured(
    recipe: Recipe, inputs: Inputs, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, TokenSet], dict | None]:
    """The tokens whose loss is measured before and after training, by name, and what the other text is. Collective."""
    measured = {} if inputs.held_out is None else {"held_out": inputs.held_out}
    if recipe.eval.other_text is None:
        return measured, None
    path = Path(recipe.eval.other_text).expanduser()
    text, source = on_rank0(lambda: measure.read_text(path, tokenizer, recipe.data.max_length))
    return measured | {"other_text": text}, source


def _allocated_ranks(
    recipe: Recipe, inputs: Inputs, device: torch.device, folder: Path
) -> dict[str, int] | None:
    """Ranks that follow from a calibration, which is then to be there before the adapters are; None if all are alike.

    It is made on a base of its own: FSDP2 cannot take in adapters once the base is sharded.
    """
    if recipe.adapter.rank_allocation == "uniform":
        return None
    path = recipe.calibration.path
    source = Path(path).expanduser() if path else folder / "calibration"
    calibration.make_from_base(
        recipe, inputs, make_engine(recipe.engine, device, inputs.dtype), source
    )
    return calibration.allocated_ranks(recipe, source)


def _resumable(folder: Path, inputs: Inputs) -> checkpoint.Checkpoint | None:
    """The run's newest whole checkpoint. Raises UserError if it was made from another base or other rows."""
    saved = checkpoint.newest(folder)
    if saved is None:
        return None
    now = {"model.name": inputs.base["weights_sha256"], "data.path": inputs.data["tokens_sha256"]}
    for field, content in now.items():
        if saved.facts["inputs"][field] != content:
            raise UserError(
                f"{field}: its content is not what this run began with ({saved.folder}); bring that back, or choose "
                "another --output"
            )
    return saved


def _initialise(
    recipe: Recipe,
    inputs: Inputs,
    engine: Engine,
    model: PeftModel,
    layers: dict[str, LoraLayer],
    tokenizer: PreTrainedTokenizerBase,
    problems: dict[str, list],
    measured: dict[str, TokenSet],
    folder: Path,
) -> dict:
    """Calibrate on the untouched base, score it if asked, and set A0, B0 and W_res; what is to be known of it later."""
    tokens, device = inputs.tokens, engine.device
    baseline: dict = {}
    with engine.inference(model), trainable.untrained(model):
        source = calibration.obtain(
            recipe, inputs, engine, model, adapter.base_layers(layers), folder / "calibration"
        )
        probe = calibration.probe(tokens, engine)
        logits = calibration.logits(model, probe)
        before = measure.predictions(engine, model, measured)
        if recipe.eval.baseline:
            watch.stage("scoring the base", timed=True)
            made_by = {
                "base": inputs.base,
                "adapter": None,
                "dtype": export.dtype_name(inputs.dtype),
            }
            baseline = score(
                engine, model, tokenizer, problems, recipe.eval, folder / "baseline", made_by
            )

    # The logits may move by rounding only.
    watch.stage("initialisation")
    ranks = {name: layer.r[adapter.ADAPTER] for name, layer in layers.items()}
    rounding = adapter.initialise(
        layers, methods.initialiser(recipe, source, ranks, device), engine
    )
    with engine.inference(model):
        moved = (calibration.logits(model, probe) - logits).abs().max() / logits.abs().max()
    drift = all_reduce_max(moved.item(), device)
    say(
        f"step 0: logits moved by at most {drift:.1e} of their largest, weights by {rounding:.1e} of their norm"
    )
    return {
        "ranks": ranks if recipe.adapter.rank_allocation != "uniform" else None,
        "inputs": {
            "model.name": inputs.base["weights_sha256"],
            "data.path": inputs.data["tokens_sha256"],
        },
        "calibration_seconds": on_rank0(lambda: artifact.seconds(source)) if source else 0.0,
        "logit_drift": drift,
        "residual_rounding": rounding,
        "baseline": baseline,
        "before": before,
    }
