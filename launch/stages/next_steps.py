"""Commands for what people do with a run next: repeat, score, compare and serve it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from launch.config.schema import EVAL_OPTIONS, Recipe
from launch.run.folder import BASELINE, RECIPE
from launch.run.results import RunResults
from launch.scoring.responses import GENERATIONS
from launch.training.chat_files import has_chat_files
from launch.training.model_card import find_vllm_rank, list_exports, list_vllm_words

PAGE = "page.html"  # of launch/report.py, in the run folder


def list_next_steps(folder: Path, recipe: Recipe, results: RunResults) -> dict[str, str]:
    """Return what to do with a finished run, as label -> command for a shell.

    A server's command is left out where none can serve what was exported (DoRA). Benchmarks and
    servers of text are for causal models; and where the exported folders are gone, only the page
    can be made.
    """
    exports = list_exports(folder, recipe.export)
    if not exports or recipe.task.has_head:
        return {"compare": make_compare_command(folder)}
    steps = {
        "score": make_score_command(folder, recipe, results, exports),
        "compare": make_compare_command(folder),
    }
    serve = make_serve_command(folder, results, exports)
    return steps | ({"serve": serve} if serve else {})


def describe_next_steps(folder: Path, recipe: Recipe, results: RunResults) -> str:
    """Return the lines that a run ends with: what to do next, as commands."""
    steps = list_next_steps(folder, recipe, results)
    width = max(map(len, steps))
    return "\n".join(["next:", *(f"  {label:{width}}  {steps[label]}" for label in steps)])


def make_repeat_command(folder: Path, engine: str, num_ranks: int) -> str:
    """Return the command that makes the run in `folder` again, in a new folder beside it.

    Args:
        num_ranks: on one machine.
    """
    again = folder.with_name(f"{folder.resolve().name}-again")
    recipe = folder / RECIPE
    words = ["launch/train.py", "--recipe", str(recipe), "--output", str(again)]
    return shlex.join([*choose_launcher(engine, num_ranks), *words])


def choose_launcher(engine: str, num_ranks: int) -> list[str]:
    """Return the words that start so many ranks on one machine."""
    if num_ranks == 1:
        return ["python"]
    if engine.startswith("zero"):
        return ["deepspeed", "--num_gpus", str(num_ranks)]
    return ["torchrun", "--nproc_per_node", str(num_ranks)]


def make_score_command(
    folder: Path, recipe: Recipe, results: RunResults, exports: Sequence[str]
) -> str:
    """Return the command that scores what was exported, with the settings of the run's own scores.

    It starts the ranks of one node: a launcher's options for several nodes are the cluster's.
    """
    num_ranks = results.conditions.ranks_per_node
    words = [*choose_launcher(results.engine, num_ranks), "launch/evaluate.py", "--model"]
    if exports[0] == "model":
        words.append(str(folder / "model"))
    else:
        words.append(results.base.name)
        if results.base.revision not in (None, "main"):
            words += ["--revision", results.base.revision]
        words += ["--adapter", str(folder / exports[0])]
    engine = "zero3" if results.engine.startswith("zero3") else results.engine  # not offloaded
    if engine in ("zero3", "fsdp"):
        words += ["--engine", engine]
    words += ["--dtype", results.dtype]  # "auto" may be another on the machine that scores
    settings = recipe.eval
    if recipe.data.is_chat and settings.prompt == "recipe":  # has no suites
        chat = {"prompt": "chat", "chat_template": recipe.data.chat_template}
        settings = settings.model_copy(update=chat)
    for suite in settings.suites or ["gsm8k"]:
        words += ["--suite", suite]
    for name in EVAL_OPTIONS:
        if not settings.is_default(name):
            value = getattr(settings, name)
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join([*words, "--output", str(folder / "scores")])


def make_compare_command(folder: Path) -> str:
    """Return the command that compares the run with its base; with no base's responses, a page."""
    if all((folder / part / GENERATIONS).is_file() for part in ("", BASELINE)):
        return shlex.join(
            ["python", "launch/evaluate.py", "--compare", str(folder / BASELINE), str(folder)]
        )
    return make_page_command([folder], folder / PAGE)


def make_page_command(folders: Sequence[Path], path: Path) -> str:
    """Return the command that makes the page of some runs."""
    return shlex.join(["python", "launch/report.py", *map(str, folders), "--html", str(path)])


def make_serve_command(folder: Path, results: RunResults, exports: Sequence[str]) -> str | None:
    """Return vLLM's command for what was exported; None where it cannot serve that."""
    for name in ("merged", "model"):
        if name in exports:
            return shlex.join(list_vllm_words(results, str((folder / name).resolve())))
    rank = find_vllm_rank(results.lora_rank) if "lora" in exports else None
    if rank is None:
        return None
    lora = str((folder / "lora").resolve())
    return shlex.join(list_vllm_words(results, None, lora, rank, has_chat_files(folder / "lora")))
