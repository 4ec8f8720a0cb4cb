"""From a recipe to a trained, exported and evaluated adapter."""

import sys
import time
from pathlib import Path

if not __package__:  # run as a script: the repository root, not launch/, is where imports are looked up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch import cli
from launch.errors import UserError, run
from launch.recipe import read, to_yaml

EXAMPLES = """\
  deepspeed --num_gpus 2 launch/train.py --recipe quickstart
  deepspeed launch/train.py --recipe metamath --output runs/metamath
  deepspeed launch/train.py --recipe metamath --set model.name=/models/llama --set train.lr=1e-4
  python launch/train.py --recipe runs/metamath/recipe.yaml --set engine=single --output runs/again"""


def main() -> None:
    parser = cli.parser(__doc__, EXAMPLES, fields=True)
    parser.add_argument("--recipe", required=True, help="name of a file in recipes/, or a path to one")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field; repeatable"
    )
    parser.add_argument("--engine", help="short for --set engine=ENGINE")
    parser.add_argument("--output", type=Path, help="run folder (default runs/RECIPE)")
    arguments = parser.parse_args()
    engine = [f"engine={arguments.engine}"] if arguments.engine else []
    recipe = read(arguments.recipe, arguments.set + engine)
    folder = arguments.output or Path("runs") / Path(arguments.recipe).stem

    # After the recipe is known to be good: these imports take seconds.
    import torch
    import torch.distributed as dist
    from transformers import AutoTokenizer

    from astra import adapter
    from launch import calibration, export, tracking
    from launch.data import num_steps, step_rows
    from launch.distributed import all_reduce_max, on_rank0, start, stop
    from launch.engines import make_engine
    from launch.inputs import open_run, prepare
    from launch.loop import train
    from launch.report import table
    from launch.scoring import read_problems, score

    device = start()
    rank, world_size = dist.get_rank(), dist.get_world_size()

    if recipe.engine == "single" and world_size > 1:
        raise UserError(f"engine: single trains in one process, not {world_size}; set engine=zero3 or start one rank")

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    if on_rank0(lambda: open_run(folder, to_yaml(recipe))):
        say(f"{folder} holds this run, finished; see {folder / 'results.json'}")
        return stop()

    # 1. Inputs: a local model folder, tokens, problems. What is wrong with them shows before anything long starts.
    name = recipe.model.name
    inputs = prepare(recipe, device)
    recipe, tokens = inputs.recipe, inputs.tokens  # the quickstart's paths in the place of its name
    tokenizer = AutoTokenizer.from_pretrained(inputs.model_path, local_files_only=True)
    problems = read_problems(recipe.eval)
    settings = recipe.train
    total = num_steps(len(tokens), settings.global_batch, settings.epochs, settings.max_steps)
    steps = list(step_rows(len(tokens), settings.global_batch, settings.epochs, settings.max_steps, settings.seed))
    say(
        f"{len(tokens)} rows ({tokens.num_cut} cut at {recipe.data.max_length} tokens, {tokens.num_left_out} dropped), "
        f"{total} steps of {settings.global_batch} rows on {world_size} ranks, micro batch {settings.micro_batch}"
    )

    # 2. The base model, already sharded, with PEFT's layers at the targets.
    engine = make_engine(recipe.engine, device, inputs.dtype)
    base = engine.load(str(inputs.model_path))
    model = adapter.attach(
        base, recipe.adapter.targets, recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.dropout
    )
    layers = adapter.lora_layers(model)

    # 3. Calibrate on the untouched base, and score it if asked.
    started = time.perf_counter()
    with engine.inference(model), model.disable_adapter():
        subspaces = calibration.subspaces(recipe, engine, model, adapter.base_layers(layers), tokens)
        seconds = {"calibration": time.perf_counter() - started}
        probe = calibration.probe(tokens, engine)
        logits = calibration.logits(model, probe)
        baseline = (
            score(engine, model, tokenizer, problems, recipe.eval, folder / "baseline") if recipe.eval.baseline else {}
        )
    if rank == 0 and subspaces:
        export.save_subspaces(folder / "calibration", subspaces, calibration.manifest(recipe, inputs))

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
    history = tracking.track(
        train(
            engine,
            model,
            tokens,
            steps,
            global_batch=settings.global_batch,
            micro_batch=settings.micro_batch,
            lr=settings.lr,
            warmup_ratio=settings.warmup_ratio,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
        ),
        total,
        folder,
        rank,
    )
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
            "recipe": Path(arguments.recipe).stem,
            "model": name,
            "base": inputs.base,
            "data": inputs.data,
            "method": recipe.adapter.method,
            "eigen_select": recipe.adapter.eigen_select if subspaces else None,
            "rank": recipe.adapter.rank,
            "lora_rank": export.plain_rank(folder),
            "alpha": recipe.adapter.alpha,
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
            "conditions": tracking.conditions(world_size, device),
        }
        (folder / "README.md").write_text(export.model_card(recipe, results))
        tracking.write_json(folder / "results.json", results)
        print(table([folder]))
        print(f"plots: {folder / 'loss.png'} {folder / 'grad_norm.png'}  adapter for the base: {folder / 'lora'}")
    stop()


if __name__ == "__main__":
    run(main)
