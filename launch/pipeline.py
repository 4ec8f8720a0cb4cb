"""The main path of a fine-tuning run, stage by stage."""

import time
from pathlib import Path

import torch
import torch.distributed as dist

from astra import adapter
from launch import calibration, export, tracking
from launch.data import num_steps, step_rows
from launch.distributed import all_reduce_max, on_rank0, say, start, stop
from launch.engines import make_engine
from launch.errors import UserError
from launch.hub import load_tokenizer
from launch.inputs import open_run, prepare
from launch.loop import train
from launch.recipe import Recipe, to_yaml
from launch.report import table
from launch.scoring import read_problems, score


def fine_tune(recipe: Recipe, name: str, folder: Path) -> None:
    """Run `recipe`, called `name` in the results, into the run folder. Every rank of a launcher calls it."""
    device = start()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if recipe.engine == "single" and world_size > 1:
        raise UserError(f"engine: single trains in one process, not {world_size}; set engine=zero3 or start one rank")
    if on_rank0(lambda: open_run(folder, to_yaml(recipe))):
        say(f"{folder} holds this run, finished; see {folder / 'results.json'}")
        stop()
        return

    # 1. A local model folder, tokens, problems. What is wrong with them shows before anything long starts.
    model_name, settings = recipe.model.name, recipe.train
    inputs = prepare(recipe, device)
    recipe, tokens = inputs.recipe, inputs.tokens  # the quickstart's paths in the place of its name
    tokenizer = load_tokenizer(inputs.model_path)
    problems = read_problems(recipe.eval)
    total = num_steps(len(tokens), settings.global_batch, settings.epochs, settings.max_steps)
    steps = list(step_rows(len(tokens), settings.global_batch, settings.epochs, settings.max_steps, settings.seed))
    say(
        f"{len(tokens)} rows ({tokens.num_cut} cut at {recipe.data.max_length} tokens, {tokens.num_left_out} dropped), "
        f"{total} steps of {settings.global_batch} rows on {world_size} ranks, micro batch {settings.micro_batch}"
    )

    # 2. The base model, already sharded, with PEFT's layers at the targets.
    engine = make_engine(recipe.engine, device, inputs.dtype)
    wanted = recipe.adapter
    base = engine.load(str(inputs.model_path))
    model = adapter.attach(base, wanted.targets, wanted.rank, wanted.alpha, wanted.dropout)
    layers = adapter.lora_layers(model)

    # 3. Calibrate on the untouched base, and score it if asked.
    started = time.perf_counter()
    baseline = {}
    with engine.inference(model), model.disable_adapter():
        subspaces = calibration.subspaces(recipe, engine, model, adapter.base_layers(layers), tokens)
        seconds = {"calibration": time.perf_counter() - started}
        probe = calibration.probe(tokens, engine)
        logits = calibration.logits(model, probe)
        if recipe.eval.baseline:
            baseline = score(engine, model, tokenizer, problems, recipe.eval, folder / "baseline")
    conditions = tracking.conditions(world_size, device)
    if rank == 0 and subspaces:
        export.save_subspaces(folder / "calibration", subspaces, calibration.manifest(recipe, inputs, conditions))

    # 4. A0, B0 and W_res into the sharded model. The logits may move by rounding only.
    rounding = adapter.initialise(layers, calibration.factors(recipe, subspaces), engine)
    initial = adapter.read_factors(layers, engine)
    with engine.inference(model):
        moved = (calibration.logits(model, probe) - logits).abs().max() / logits.abs().max()
    drift = all_reduce_max(moved.item(), device)
    say(f"step 0: logits moved by at most {drift:.1e} of their largest, weights by {rounding:.1e} of their norm")

    # 5. Train.
    torch.manual_seed(settings.seed + rank)  # dropout
    if settings.gradient_checkpointing is True or (settings.gradient_checkpointing == "auto" and device.type == "cuda"):
        model.enable_input_require_grads()  # the reentrant form needs an input with a gradient
        model.gradient_checkpointing_enable({"use_reentrant": engine.reentrant})
    started = time.perf_counter()
    history = tracking.track(train(engine, model, tokens, steps, settings), total, folder, rank)
    seconds["training"] = time.perf_counter() - started
    model.gradient_checkpointing_disable()

    # 6. Export, then score.
    trained = adapter.read_factors(layers, engine)
    if rank == 0:
        export.save_adapters(folder, model.peft_config[adapter.ADAPTER], inputs.base, initial, trained)
        tracking.plot({folder.name: history}, folder)
    scores = score(engine, model, tokenizer, problems, recipe.eval, folder)

    # 7. One results row, with the conditions its numbers hold for; written last, it marks the run as finished.
    if rank == 0:
        results = {
            "recipe": name,
            "model": model_name,
            "base": inputs.base,
            "data": inputs.data,
            "method": wanted.method,
            "eigen_select": wanted.eigen_select if subspaces else None,
            "rank": wanted.rank,
            "lora_rank": export.plain_rank(folder),
            "alpha": wanted.alpha,
            "lr": settings.lr,
            "seed": settings.seed,
            "steps": total,
            "final_loss": history[-1]["loss"],
            "logit_drift": drift,
            "residual_rounding": rounding,
            "engine": recipe.engine,
            "dtype": export.dtype_name(inputs.dtype),
            "seconds": seconds,
            "baseline": baseline,
            "scores": scores,
            "conditions": conditions,
        }
        (folder / "README.md").write_text(export.model_card(recipe, results))
        tracking.write_json(folder / "results.json", results)
        say(table([folder]))
    say(f"plots: {folder / 'loss.png'} {folder / 'grad_norm.png'}  adapter for the base: {folder / 'lora'}")
    stop()
