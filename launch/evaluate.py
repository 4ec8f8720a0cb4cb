"""Score a model, with or without an adapter, on benchmarks: generation on all ranks or by a server, then grades.

Started again on the same --output it goes on with the responses that are not there yet. --grade grades stored responses
again, --compare holds two results against each other; neither needs a model."""

import argparse
import json
import sys
from pathlib import Path

if (
    not __package__
):  # run as a script: the repository root, not launch/, is where imports are looked up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.tasks import GROUPS, TASKS
from launch import cli
from launch.config.schema import Eval, section
from launch.runtime.errors import UserError, run

EXAMPLES = """\
  python launch/evaluate.py --model meta-llama/Llama-2-7b-hf --adapter runs/metamath/lora --suite gsm8k --output scores
  deepspeed launch/evaluate.py --model /models/llama --suite math --suite commonsense --data-dir data --output scores
  python launch/evaluate.py --model quickstart --data-dir quickstart --adapter runs/quickstart/lora --output s
  python launch/evaluate.py --backend openai --url http://localhost:8000/v1 --model llama --suite humaneval --output s
  python launch/evaluate.py --compare scores/base scores/astra
  python launch/evaluate.py --grade scores/generations.jsonl --data-dir data"""


def main() -> None:
    defaults = Eval()
    parser = cli.parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--model",
        help="base model: hub id, local folder, or quickstart; with a server, its name there",
    )
    add("--revision", default="main", help="hub revision of the model (default main)")
    add(
        "--adapter",
        type=Path,
        help="lora/ or adapter/ of a run, or any PEFT adapter; none for the base",
    )
    add(
        "--suite",
        action="append",
        choices=[*TASKS, *GROUPS],
        help="benchmark; repeatable (default gsm8k)",
    )
    add("--data-dir", help="folder with the benchmarks' files (default: the hub), or quickstart")
    add("--limit", type=int, help="problems of each suite, the first so many (default all)")
    add(
        "--prompt",
        default=defaults.prompt,
        choices=["recipe", "literature"],
        help="default %(default)s",
    )
    add("--max-new-tokens", type=int, help="default: each benchmark's published number")
    add(
        "--batch-size",
        type=int,
        default=defaults.batch_size,
        help="on each rank, default %(default)s",
    )
    add(
        "--samples",
        type=int,
        default=1,
        help="responses to each problem, for pass@k (default %(default)s)",
    )
    add("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    add("--seed", type=int, default=0, help="of samples (default %(default)s)")
    add(
        "--timeout",
        type=float,
        default=defaults.timeout,
        help="seconds of a generated program (default %(default)s)",
    )
    add(
        "--allow-unsandboxed",
        action="store_true",
        help="run programs even where nothing can box them in",
    )
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="default %(default)s",
    )
    add(
        "--engine",
        default="single",
        choices=["single", "zero3", "fsdp"],
        help="single: every rank holds the whole model; zero3, fsdp: ranks hold shards (default %(default)s)",
    )
    add(
        "--backend",
        default="transformers",
        choices=["transformers", "openai"],
        help="default %(default)s",
    )
    add("--url", help="of an OpenAI-compatible server, up to and with /v1")
    add(
        "--concurrency",
        type=int,
        default=16,
        help="requests to the server at once (default %(default)s)",
    )
    add(
        "--grade",
        type=Path,
        metavar="FILE",
        help="grade the rows of FILE again: suite, output, and reference or id",
    )
    add(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="folders of two evaluations: the paired difference",
    )
    add("--output", type=Path, help="folder for results.json and generations.jsonl")
    cli.add_stall(parser)
    arguments = parser.parse_args()
    if arguments.compare:
        _compare(*arguments.compare)
    elif arguments.grade:
        _grade_again(arguments)
    else:
        for name in ("model", "output", *(["url"] if arguments.backend == "openai" else [])):
            if getattr(arguments, name) is None:
                raise UserError(f"--{name}: is required")
        _evaluate(arguments)


def _settings(arguments: argparse.Namespace) -> Eval:
    fields = (
        "data_dir",
        "limit",
        "prompt",
        "max_new_tokens",
        "batch_size",
        "samples",
        "temperature",
        "seed",
    )
    fields += ("timeout", "allow_unsandboxed")
    values = {name: getattr(arguments, name) for name in fields}
    return section(Eval, suites=arguments.suite or ["gsm8k"], **values)


def _evaluate(arguments: argparse.Namespace) -> None:
    import torch.distributed as dist

    from launch.quickstart import base as quickstart
    from launch.run.folder import make_folder
    from launch.runtime import watchdog as watch
    from launch.runtime.distributed import on_rank0, start, stop
    from launch.runtime.files import write_json
    from launch.scoring.score import describe, read_problems
    from launch.training import metrics_log as tracking

    device = start(arguments.stall)
    watch.stage("reading the inputs")
    on_rank0(lambda: make_folder(arguments.output))
    if quickstart.NAME in (arguments.model, arguments.data_dir):
        folder = str(quickstart.ensure(device))
        arguments.model = folder if arguments.model == quickstart.NAME else arguments.model
        arguments.data_dir = folder if arguments.data_dir == quickstart.NAME else arguments.data_dir
    settings = _settings(arguments)
    problems = read_problems(settings)
    backend = _with_server if arguments.backend == "openai" else _with_model
    identity, scores = backend(arguments, settings, problems, device)
    if dist.get_rank() == 0:
        results = identity | {
            "adapter": arguments.adapter and str(arguments.adapter),
            "settings": settings.model_dump(),
            "scores": scores,
            "conditions": tracking.conditions(dist.get_world_size(), device),
        }
        write_json(arguments.output / "results.json", results)
        table = describe(scores)
        (arguments.output / "results.md").write_text(table + "\n")
        print(table)
        print(f"responses and their grades: {arguments.output / 'generations.jsonl'}")
    stop()


def _with_model(
    arguments: argparse.Namespace, settings: Eval, problems: dict, device
) -> tuple[dict, dict]:  # noqa: ANN001
    """What the responses depend on, and the scores; by the model itself, on all ranks. Collective."""
    import torch.distributed as dist

    from astra import adapter
    from launch.data.inputs import resolve_dtype
    from launch.engines import make_engine
    from launch.runtime import watchdog as watch
    from launch.runtime.distributed import on_each_node, on_rank0
    from launch.runtime.model_files import fetch_model, load_tokenizer, weights_hash
    from launch.scoring import score
    from launch.training.export import dtype_name

    def fetch() -> tuple[Path, str]:
        path = fetch_model(arguments.model, arguments.revision)
        return path, weights_hash(path)

    fetched = on_each_node(fetch)  # disks need not be shared
    path, _ = fetched[dist.get_rank()]
    if len({content for _, content in fetched}) > 1:
        raise UserError(
            f"--model: the weights of {arguments.model} differ between the nodes; copy one's to all"
        )
    base = {"name": arguments.model, "weights_sha256": fetched[0][1]}
    made_for = (
        on_rank0(lambda: _check_adapter(arguments.adapter, base)) if arguments.adapter else None
    )
    adapter_hash = on_rank0(lambda: weights_hash(arguments.adapter)) if arguments.adapter else None
    tokenizer = load_tokenizer(path)
    engine = make_engine(arguments.engine, device, resolve_dtype(arguments.dtype, device))
    watch.stage("loading the base")
    model = engine.load(str(path))
    model.register_forward_pre_hook(lambda *_: watch.mark())
    if arguments.adapter:
        model = adapter.attach_saved(model, arguments.adapter)
        with engine.inference(model):  # FSDP2 shards and loads the base here
            pass
        adapter.write_saved(model, arguments.adapter, engine)
    if made_for and made_for["on"] == "residual":
        base_model = model.get_base_model()
        adapter.subtract(base_model, *adapter.load(arguments.adapter.parent / "astra_init"), engine)
    identity = {"base": base, "adapter_sha256": adapter_hash, "dtype": dtype_name(engine.dtype)}
    with engine.inference(model):  # FSDP2 shards and loads a base without adapter here
        watch.stage("scoring", timed=True)
        return identity, score(
            engine, model, tokenizer, problems, settings, arguments.output, identity
        )


def _with_server(
    arguments: argparse.Namespace, settings: Eval, problems: dict, device
) -> tuple[dict, dict]:  # noqa: ANN001
    """What the responses depend on, and the scores; by the server at --url."""
    from eval.generation.server import complete
    from launch.runtime import watchdog as watch
    from launch.scoring.score import score_responses

    identity = {"base": {"name": arguments.model, "weights_sha256": None}, "url": arguments.url}

    def responses(suite, requests: list):  # noqa: ANN001, ANN202
        return complete(
            arguments.url,
            arguments.model,
            [request.prompt for request in requests],
            max_new_tokens=settings.max_new_tokens or suite.max_new_tokens,
            stops=suite.stops if settings.prompt == "literature" else (),
            temperature=settings.temperature,
            seeds=[request.seed for request in requests],
            concurrency=arguments.concurrency,
        )

    watch.stage("scoring", timed=True)
    return identity, score_responses(responses, problems, settings, arguments.output, identity)


def _grade_again(arguments: argparse.Namespace) -> None:
    """Grade the rows of a file, with no model: by both graders, to --output or beside the file."""
    from eval import grading
    from launch.scoring.score import describe, read_generations

    path = arguments.grade
    if not path.is_file():
        raise UserError(f"--grade: no file {path}")
    if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        raise UserError(
            f"--grade: the last line of {path} has no end; it may be cut short: complete or remove it"
        )
    rows = read_generations(path)
    if not rows:
        raise UserError(f"--grade: {path} has no rows")
    options = {"timeout": arguments.timeout, "allow_unsandboxed": arguments.allow_unsandboxed}
    for number, row in enumerate(rows, start=1):
        if row.get("suite") not in TASKS or not isinstance(row.get("output"), str):
            raise UserError(
                f"--grade: row {number} of {path} needs a suite ({', '.join(TASKS)}) and the text output"
            )
    scores, graded = {}, []
    for name in dict.fromkeys(row["suite"] for row in rows):
        suite, of = TASKS[name], [row for row in rows if row["suite"] == name]
        problems = grading.problems_of(
            suite, of, Path(arguments.data_dir) if arguments.data_dir else None
        )
        grades = list(grading.grade(suite, problems, [row["output"] for row in of], **options))
        for row, given in zip(of, grades, strict=True):
            reason = {"reason": given["strict"].reason} if suite.kind == "code" else {}
            graded.append(row | {grader: grade.passed for grader, grade in given.items()} | reason)
        found = {
            grader: grading.summary([[g[grader].passed] for g in grades]) for grader in grades[0]
        }
        scores[name] = found["strict"] | {"literature": found["literature"], "prompt": ""}
    output = arguments.output or path.parent
    output.mkdir(parents=True, exist_ok=True)
    where = output / "graded.jsonl"
    where.write_text("".join(json.dumps(row) + "\n" for row in graded))
    print(describe(scores))
    print(f"grades: {where}")


def _compare(first: Path, second: Path) -> None:
    from eval.compare import compare, describe
    from launch.scoring.score import GENERATIONS, read_generations

    for folder in (first, second):
        if not (folder / GENERATIONS).is_file():
            raise UserError(
                f"--compare: {folder} has no {GENERATIONS}; give folders of launch/evaluate.py or of runs"
            )
    rows = [read_generations(folder / GENERATIONS) for folder in (first, second)]
    print(describe(compare(*rows), (str(first), str(second))))


def _check_adapter(folder: Path, base: dict) -> dict | None:
    """What the adapter was made for; UserError if that is another base, or the folder holds no adapter."""
    from launch.training import export

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
