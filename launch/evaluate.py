"""Score a model, with or without an adapter, on benchmarks: greedy generation on all ranks, then grades."""

import sys
from pathlib import Path

if not __package__:  # run as a script: the repository root, not launch/, is where imports are looked up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.tasks import TASKS
from launch import cli
from launch.errors import UserError, run
from launch.recipe import Eval

EXAMPLES = """\
  python launch/evaluate.py --model meta-llama/Llama-2-7b-hf --adapter runs/metamath/lora --suite gsm8k --output scores
  deepspeed launch/evaluate.py --model /models/llama --suite gsm8k --data-dir data --limit 100 --output scores
  python launch/evaluate.py --model quickstart --data-dir quickstart --adapter runs/quickstart/lora --output s"""


def main() -> None:
    defaults = Eval()
    parser = cli.parser(__doc__, EXAMPLES)
    parser.add_argument("--model", required=True, help="base model: hub id, local folder, or quickstart")
    parser.add_argument("--revision", default="main", help="hub revision of the model (default main)")
    parser.add_argument(
        "--adapter", type=Path, help="lora/ or adapter/ of a run, or any PEFT adapter; none for the base"
    )
    parser.add_argument("--suite", action="append", choices=list(TASKS), help="benchmark; repeatable (default gsm8k)")
    parser.add_argument("--data-dir", help="folder with the benchmarks' files (default: the hub), or quickstart")
    parser.add_argument("--limit", type=int, help="problems of each suite, the first so many (default all)")
    parser.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens, help="default %(default)s")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help="default %(default)s")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="default %(default)s")
    parser.add_argument(
        "--engine",
        default="single",
        choices=["single", "zero3", "fsdp"],
        help="single: every rank holds the whole model; zero3, fsdp: ranks hold shards (default %(default)s)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json and generations.jsonl")
    arguments = parser.parse_args()
    suites = arguments.suite or ["gsm8k"]

    import torch.distributed as dist

    from astra import adapter
    from launch import export, quickstart, tracking, watch
    from launch.distributed import on_rank0, start, stop
    from launch.engines import make_engine
    from launch.files import write_json
    from launch.hub import fetch_model, load_tokenizer, weights_hash
    from launch.inputs import resolve_dtype
    from launch.recipe import section
    from launch.run_folder import make_folder
    from launch.scoring import describe, read_problems, score

    device = start()
    on_rank0(lambda: make_folder(arguments.output))
    if quickstart.NAME in (arguments.model, arguments.data_dir):
        folder = str(quickstart.ensure(device))
        arguments.model = folder if arguments.model == quickstart.NAME else arguments.model
        arguments.data_dir = folder if arguments.data_dir == quickstart.NAME else arguments.data_dir
    settings = section(
        Eval,
        suites=suites,
        data_dir=arguments.data_dir,
        limit=arguments.limit,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
    )
    problems = read_problems(settings)
    path = on_rank0(lambda: fetch_model(arguments.model, arguments.revision))
    base = on_rank0(lambda: {"name": arguments.model, "weights_sha256": weights_hash(path)})
    made_for = on_rank0(lambda: _check_adapter(arguments.adapter, base)) if arguments.adapter else None

    tokenizer = load_tokenizer(path)
    engine = make_engine(arguments.engine, device, resolve_dtype(arguments.dtype, device))
    model = engine.load(str(path))
    if arguments.adapter:
        model = adapter.attach_saved(model, arguments.adapter)
        with engine.inference(model):  # FSDP2 shards and loads the base here
            pass
        adapter.write_saved(model, arguments.adapter, engine)
    if made_for and made_for["on"] == "residual":
        base_model = model.get_base_model()
        adapter.subtract(base_model, *adapter.load(arguments.adapter.parent / "astra_init"), engine)
    watch.stage("scoring", timed=True)
    with engine.inference(model):
        scores = score(engine, model, tokenizer, problems, settings, arguments.output)
    if dist.get_rank() == 0:
        results = {
            "base": base,
            "adapter": arguments.adapter and str(arguments.adapter),
            "max_new_tokens": settings.max_new_tokens,
            "dtype": export.dtype_name(engine.dtype),
            "scores": scores,
            "conditions": tracking.conditions(dist.get_world_size(), device),
        }
        write_json(arguments.output / "results.json", results)
        print(describe(scores))
        print(f"generations: {arguments.output / 'generations.jsonl'}")
    stop()


def _check_adapter(folder: Path, base: dict) -> dict | None:
    """What the adapter was made for; UserError if that is another base, or the folder holds no adapter."""
    from launch import export

    if not (folder / "adapter_config.json").is_file():
        hint = f"; did you mean {folder / 'lora'}?" if (folder / "lora").is_dir() else ""
        raise UserError(f"--adapter: {folder} has no adapter_config.json{hint}")
    made_for = export.read_base(folder)
    if made_for and made_for["weights_sha256"] != base["weights_sha256"]:
        raise UserError(
            f"--adapter: {folder} was made for {made_for['name']} with weights {made_for['weights_sha256'][:12]}, not "
            f"for {base['name']} with {base['weights_sha256'][:12]}; give that base as --model"
        )
    if made_for and made_for["on"] == "residual" and not (folder.parent / "astra_init").is_dir():
        raise UserError(
            f"--adapter: {folder} needs {folder.parent / 'astra_init'}, which is missing; use lora/ instead"
        )
    return made_for


if __name__ == "__main__":
    run(main)
