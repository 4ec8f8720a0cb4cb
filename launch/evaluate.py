"""Score a model, with or without an adapter, on benchmarks.

All ranks generate, or a server does; then each response is graded. Started again on the same
--output, it resumes with the responses that are missing. --grade grades stored responses again,
--compare compares two evaluations; neither needs a model."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: imports are to be looked up from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.tasks import BENCHMARKS, GROUPS
from launch import cli
from launch.config.loading import validate_section
from launch.config.schema import EVAL_OPTIONS, Eval, Model
from launch.runtime.entry import run_command
from launch.runtime.errors import UserError

if TYPE_CHECKING:  # takes seconds to import, and a wrong option is to be answered at once
    import torch

    from launch.run.results import Score
    from launch.runtime.locks import FolderLock

EXAMPLES = """\
  python launch/evaluate.py --model meta-llama/Llama-2-7b-hf --adapter runs/metamath/lora --suite gsm8k --output scores
  deepspeed launch/evaluate.py --model /models/llama --suite math --suite commonsense --data-dir data --output scores
  python launch/evaluate.py --model quickstart --data-dir quickstart --adapter runs/quickstart/lora --output s
  python launch/evaluate.py --backend openai --url http://localhost:8000/v1 --model llama --suite humaneval --output s
  python launch/evaluate.py --compare scores/base scores/astra
  python launch/evaluate.py --grade scores/generations.jsonl --data-dir data"""


# All options that --compare and --grade take.
OF_COMPARE = {"compare"}
OF_GRADE = {"grade", "output", "data_dir", "timeout", "allow_unsandboxed"}
# Options of one --backend alone; --adapter too is of a model's.
OF_MODEL_ONLY = {"revision", "dtype", "engine", "batch_size"}
OF_SERVER_ONLY = {"url", "concurrency"}


def main() -> None:
    """Evaluate, compare or grade, as the command line says."""
    parser = _make_parser()
    arguments = parser.parse_args()
    _refuse_unused(parser, arguments)
    if arguments.compare:
        _compare(*arguments.compare)
    elif arguments.grade:
        _regrade(arguments)
    else:
        _evaluate(arguments)


def _refuse_unused(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Raise UserError for options that would be ignored beside the others."""
    values = vars(arguments).items()
    given = {name for name, value in values if value != parser.get_default(name)}
    given -= {"local_rank"}  # of launchers
    if arguments.compare:
        what, unused = "--compare", given - OF_COMPARE
    elif arguments.grade:
        what, unused = "--grade", given - OF_GRADE
    elif arguments.backend == "openai":
        if arguments.adapter:
            raise UserError(
                "--adapter: a server holds its own adapters; give the name it has there as --model"
            )
        what, unused = "--backend openai", given & OF_MODEL_ONLY
    else:
        what, unused = "--backend transformers", given & OF_SERVER_ONLY
    if unused:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(unused))
        raise UserError(f"{options}: no effect with {what}; leave out")


def _make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--model",
        help="base model: hub id, local folder, or quickstart; with a server, its name there",
    )
    cli.add_field_options(parser, Model, "revision")
    add(
        "--adapter",
        type=Path,
        help="lora/, lora_small/ or adapter/ of a run, or another LoRA of PEFT"
        " (docs/evaluation.md says which); none for the base",
    )
    add(
        "--suite",
        action="append",
        choices=[*BENCHMARKS, *GROUPS],
        help="benchmark; repeatable (default gsm8k)",
    )
    cli.add_field_options(parser, Eval, *EVAL_OPTIONS)
    cli.add_field_options(parser, Model, "dtype")
    add(
        "--engine",
        default="single",
        choices=["single", "zero3", "fsdp"],
        help="single: every rank holds the whole model; zero3, fsdp: ranks hold shards "
        "(default %(default)s)",
    )
    add(
        "--backend",
        default="transformers",
        choices=["transformers", "openai"],
        help="what generates: this command, or a server (default %(default)s)",
    )
    add("--url", help="address of an OpenAI-compatible server, up to and with /v1")
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
    cli.add_stall_option(parser)
    return parser


def _compare(first: Path, second: Path) -> None:
    from launch.scoring.compare_evaluations import compare_evaluations

    print(compare_evaluations(first, second))


def _regrade(arguments: argparse.Namespace) -> None:
    from launch.quickstart import base as quickstart
    from launch.scoring.regrade import GRADED, regrade_responses
    from launch.scoring.score_table import render_scores

    output = arguments.output or arguments.grade.parent
    data_dir = Path(arguments.data_dir).expanduser() if arguments.data_dir else None
    if arguments.data_dir == quickstart.NAME:
        data_dir = quickstart.cache_folder()
    scores = regrade_responses(
        arguments.grade,
        output,
        data_dir,
        arguments.timeout,
        arguments.allow_unsandboxed,
    )
    print(render_scores(scores))
    print(f"grades: {output / GRADED}")


def _evaluate(arguments: argparse.Namespace) -> None:
    required = ["model", "output"]
    if arguments.backend == "openai":
        required.append("url")
    for name in required:
        if getattr(arguments, name) is None:
            raise UserError(f"--{name}: is required")

    from launch.runtime import watchdog
    from launch.runtime.distributed import run_on_rank0, start_process_group, stop_process_group
    from launch.scoring.evaluate_model import ModelSource, evaluate_model
    from launch.scoring.evaluate_server import evaluate_server
    from launch.scoring.score import read_problems

    device = start_process_group(arguments.stall)
    watchdog.set_phase("reading the inputs")
    output = arguments.output
    lock = _open_output_folder(output)
    model, data_dir = _resolve_quickstart(arguments.model, arguments.data_dir, device)
    values = {name: getattr(arguments, name) for name in EVAL_OPTIONS}
    values |= {"data_dir": data_dir, "suites": arguments.suite or ["gsm8k"]}
    settings = validate_section(Eval, values)
    problems = read_problems(settings)
    if arguments.backend == "openai":
        identity, scores = evaluate_server(
            arguments.url, model, arguments.concurrency, problems, settings, output
        )
    else:
        source = ModelSource(
            model, arguments.revision, arguments.adapter, arguments.dtype, arguments.engine
        )
        identity, scores = evaluate_model(source, device, problems, settings, output)
    run_on_rank0(
        lambda: _write_results(output, identity, arguments.adapter, settings, scores, device)
    )
    stop_process_group()
    del lock  # held until here


def _open_output_folder(folder: Path) -> "FolderLock":
    """Make and lock the folder of the evaluation. Collective.

    Returns:
        The folder's lock, which the caller keeps until the evaluation ends.

    Raises:
        UserError: it cannot be written, is in use, or holds a run, whose results would be replaced.
    """
    from launch.run.folder import RECIPE, make_folder
    from launch.runtime.distributed import run_on_rank0
    from launch.runtime.locks import FolderLock

    lock = FolderLock(folder)

    def open_folder() -> None:
        make_folder(folder)
        if (folder / RECIPE).is_file():
            raise UserError(
                f"--output: {folder} holds a run; choose another, such as {folder / 'scores'}"
            )
        lock.acquire()

    run_on_rank0(open_folder)
    return lock


def _resolve_quickstart(
    model: str, data_dir: str | None, device: "torch.device"
) -> tuple[str, str | None]:
    """Return `model` and `data_dir` with the quickstart's folder in the place of its name.

    The quickstart is made first if it is not cached. Collective.
    """
    from launch.quickstart import base as quickstart

    if quickstart.NAME not in (model, data_dir):
        return model, data_dir
    folder = str(quickstart.ensure_quickstart(device))
    model = folder if model == quickstart.NAME else model
    data_dir = folder if data_dir == quickstart.NAME else data_dir
    return model, data_dir


def _write_results(
    output: Path,
    identity: dict,
    adapter: Path | None,
    settings: Eval,
    scores: dict[str, "Score"],
    device: "torch.device",
) -> None:
    """Write results.json and results.md, and print the scores; on rank 0."""
    import torch.distributed as dist

    from launch.run.provenance import describe_conditions
    from launch.run.results import RESULTS, EvaluationResults, write_results
    from launch.runtime.files import write_text
    from launch.scoring.responses import GENERATIONS, read_generations
    from launch.scoring.score_table import render_scores

    results = EvaluationResults(
        **identity,
        adapter=None if adapter is None else str(adapter),
        settings=settings.model_dump(),
        scores=scores,
        conditions=describe_conditions(dist.get_world_size(), device),
    )
    write_results(output, results)
    table = render_scores(scores)
    write_text(output / "results.md", table + "\n")
    print(table)
    print(f"responses and their grades: {output / GENERATIONS}")
    kept = dict.fromkeys(row["suite"] for row in read_generations(output / GENERATIONS))
    others = [name for name in kept if name not in scores]
    if others:
        print(
            f"{RESULTS} leaves out {', '.join(others)}: {GENERATIONS} has responses of an earlier "
            "command; give every --suite in one command to have the scores together"
        )


if __name__ == "__main__":
    run_command(main)
