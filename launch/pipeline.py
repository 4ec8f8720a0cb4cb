"""The main path of a fine-tuning run, stage by stage."""

import contextlib
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedTokenizerBase

from astra import adapter
from launch import artifact, calibration, checkpoint, export, methods, tracking, watch
from launch.data import num_steps, step_rows
from launch.distributed import all_reduce_max, on_rank0, say, start, stop
from launch.engines import Engine, make_engine
from launch.errors import USER_ERRORS, UserError
from launch.files import write_json
from launch.hub import load_tokenizer
from launch.inputs import Inputs, prepare
from launch.loop import make_stepper, train
from launch.recipe import Recipe
from launch.report import table
from launch.run_folder import open_run, write_state
from launch.scoring import read_problems, score


def fine_tune(recipe: Recipe, name: str, folder: Path, stall: float) -> None:
    """Run `recipe`, called `name` in the results, into the run folder. Every rank of a launcher calls it.

    Started again on the same folder it goes on from the newest whole checkpoint.
    """
    device = start(stall)
    world_size = dist.get_world_size()
    if recipe.engine == "single" and world_size > 1:
        raise UserError(f"engine: single trains in one process, not {world_size}; set engine=zero3 or start one rank")
    if on_rank0(lambda: open_run(folder, recipe)):
        say(f"{folder} holds this run, finished; see {folder / 'results.json'}")
    else:
        watch.on_preempted(lambda: write_state(folder, "preempted"))
        try:
            _fine_tune(recipe, name, folder, device)
        except USER_ERRORS:
            if dist.get_rank() == 0:
                with contextlib.suppress(OSError):  # a full disk, say: the error itself is what the user is to see
                    write_state(folder, "error")
            raise
    stop()


def _fine_tune(recipe: Recipe, name: str, folder: Path, device: torch.device) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()

    # 1. A local model folder, tokens, problems. What is wrong with them shows before anything long starts.
    model_name, settings = recipe.model.name, recipe.train
    watch.stage("reading the inputs")
    inputs = prepare(recipe, device)
    recipe, tokens = inputs.recipe, inputs.tokens  # the quickstart's paths in the place of its name
    tokenizer = load_tokenizer(inputs.model_path)
    problems = read_problems(recipe.eval)
    saved = on_rank0(lambda: _resumable(folder, inputs))
    total = num_steps(len(tokens), settings.global_batch, settings.epochs, settings.max_steps)
    steps = list(step_rows(len(tokens), settings.global_batch, settings.epochs, settings.max_steps, settings.seed))
    say(
        f"{len(tokens)} rows ({tokens.num_cut} cut at {recipe.data.max_length} tokens, {tokens.num_left_out} dropped), "
        f"{total} steps of {settings.global_batch} rows on {world_size} ranks, micro batch {settings.micro_batch}"
    )

    # 2. The base model, already sharded, with PEFT's layers at the targets.
    watch.stage("loading the base")
    wanted = recipe.adapter
    ranks = saved.facts["ranks"] if saved else _allocated_ranks(recipe, inputs, device, folder)
    engine = make_engine(recipe.engine, device, inputs.dtype)
    base = engine.load(str(inputs.model_path))
    base.register_forward_pre_hook(lambda *_: watch.mark())
    model = adapter.attach(base, wanted.targets, wanted.rank, wanted.alpha, wanted.dropout, ranks)
    layers = adapter.lora_layers(model)

    # 3. A0, B0 and W_res into the sharded model: from a calibration, or as a checkpoint has them.
    if saved is None:
        facts = _initialise(recipe, inputs, engine, model, layers, tokenizer, problems, folder)
        initial = adapter.read_factors(layers, engine)
        history = []
        checkpoint.save(folder, 0, layers, initial, engine, None, facts, history, settings.keep)
    else:
        say(f"going on after step {saved.step} of {total}, from {saved.folder}")
        with engine.inference(model):  # FSDP2 shards and loads the base here
            pass
        adapter.initialise(layers, checkpoint.factors(saved, "initial", device), engine)
        initial = adapter.read_factors(layers, engine)
        adapter.write_factors(layers, checkpoint.factors(saved, "trained", device), engine)
        facts, history = saved.facts, saved.history

    # 4. Train.
    if settings.gradient_checkpointing is True or (settings.gradient_checkpointing == "auto" and device.type == "cuda"):
        model.enable_input_require_grads()  # the reentrant form needs an input with a gradient
        model.gradient_checkpointing_enable({"use_reentrant": engine.reentrant})
    stepper = make_stepper(engine, model, settings)
    if saved is not None:
        checkpoint.restore_moments(saved, layers, stepper, device)
    watch.stage("training", timed=True, in_steps=True)
    training = train(stepper, tokens, steps, settings, device, history)
    for metrics in tracking.track(training, list(history), total, folder, rank):
        history.append(metrics)
        if metrics["step"] % settings.checkpoint_every == 0 and metrics["step"] < total:
            checkpoint.save(folder, metrics["step"], layers, initial, engine, stepper, facts, history, settings.keep)
    done = len(history)
    if saved is None or done > saved.step:
        checkpoint.save(folder, done, layers, initial, engine, stepper, facts, history, settings.keep)
    if done < total:
        on_rank0(lambda: write_state(folder, "preempted"))
        say(f"stopped after step {done} of {total}, saved; the same command goes on from there")
        return
    model.gradient_checkpointing_disable()

    # 5. Export, then score.
    watch.stage("exporting")
    trained = adapter.read_factors(layers, engine)
    config = model.peft_config[adapter.ADAPTER]
    on_rank0(lambda: export.save_adapters(folder, config, inputs.base, initial, trained))
    on_rank0(lambda: tracking.plot({folder.name: history}, folder))
    watch.stage("scoring", timed=True)
    made_by = {"base": inputs.base, "adapter": f"after step {total}", "dtype": export.dtype_name(inputs.dtype)}
    scores = score(engine, model, tokenizer, problems, recipe.eval, folder, made_by)

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
            "rank": wanted.rank,
            "lora_rank": export.plain_rank(folder),
            "alpha": wanted.alpha,
            "lr": settings.lr,
            "seed": settings.seed,
            "steps": total,
            "final_loss": history[-1]["loss"],
            "logit_drift": facts["logit_drift"],
            "residual_rounding": facts["residual_rounding"],
            "on_residual": (folder / "astra_init").is_dir(),
            "engine": recipe.engine,
            "dtype": export.dtype_name(inputs.dtype),
            "seconds": {"calibration": facts["calibration_seconds"], "training": history[-1]["seconds"]},
            "baseline": facts["baseline"],
            "scores": scores,
            "conditions": tracking.conditions(world_size, device),
        }
        (folder / "README.md").write_text(export.model_card(recipe, results))
        write_json(folder / "results.json", results)
        write_state(folder, "finished")

    on_rank0(finish)
    if rank == 0:
        say(table([folder]))
    say(f"plots: {folder / 'loss.png'} {folder / 'grad_norm.png'}  adapter for the base: {folder / 'lora'}")


def _allocated_ranks(recipe: Recipe, inputs: Inputs, device: torch.device, folder: Path) -> dict[str, int] | None:
    """Ranks that follow from a calibration, which is then to be there before the adapters are; None if all are alike.

    It is made on a base of its own: FSDP2 cannot take in adapters once the base is sharded.
    """
    if recipe.adapter.rank_allocation == "uniform":
        return None
    path = recipe.calibration.path
    source = Path(path).expanduser() if path else folder / "calibration"
    calibration.make_from_base(recipe, inputs, make_engine(recipe.engine, device, inputs.dtype), source)
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
    folder: Path,
) -> dict:
    """Calibrate on the untouched base, score it if asked, and set A0, B0 and W_res; what is to be known of it later."""
    tokens, device = inputs.tokens, engine.device
    baseline: dict = {}
    with engine.inference(model), model.disable_adapter():
        source = calibration.obtain(recipe, inputs, engine, model, adapter.base_layers(layers), folder / "calibration")
        probe = calibration.probe(tokens, engine)
        logits = calibration.logits(model, probe)
        if recipe.eval.baseline:
            watch.stage("scoring the base", timed=True)
            made_by = {"base": inputs.base, "adapter": None, "dtype": export.dtype_name(inputs.dtype)}
            baseline = score(engine, model, tokenizer, problems, recipe.eval, folder / "baseline", made_by)

    # The logits may move by rounding only.
    watch.stage("initialisation")
    ranks = {name: layer.r[adapter.ADAPTER] for name, layer in layers.items()}
    rounding = adapter.initialise(layers, methods.initialiser(recipe, source, ranks, device), engine)
    with engine.inference(model):
        moved = (calibration.logits(model, probe) - logits).abs().max() / logits.abs().max()
    drift = all_reduce_max(moved.item(), device)
    say(f"step 0: logits moved by at most {drift:.1e} of their largest, weights by {rounding:.1e} of their norm")
    return {
        "ranks": ranks if recipe.adapter.rank_allocation != "uniform" else None,
        "inputs": {"model.name": inputs.base["weights_sha256"], "data.path": inputs.data["tokens_sha256"]},
        "calibration_seconds": on_rank0(lambda: artifact.seconds(source)) if source else 0.0,
        "logit_drift": drift,
        "residual_rounding": rounding,
        "baseline": baseline,
    }
