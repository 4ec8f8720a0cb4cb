"""Score a model on suites: problems, generation, grades. Every response is kept as soon as it is there."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from eval.generation.schedule import generate, too_long
from eval.grading import grade, summary
from eval.sandbox import check as sandbox
from eval.tasks import TASKS, expand
from eval.tasks.base import GRADERS, Problem, Suite
from launch.config.schema import Eval
from launch.data.tokenize import encode, prompt
from launch.engines.base import Engine
from launch.runtime.distributed import on_rank0, say
from launch.runtime.errors import UserError
from launch.runtime.files import write_json, write_text
from launch.training.metrics_log import progress, progress_of

GENERATIONS, MADE_WITH = "generations.jsonl", "generation.json"


class Request(NamedTuple):
    """One response that is wanted."""

    problem: Problem
    sample: int  # from 0
    prompt: str
    seed: int


Responses = Callable[[Suite, list[Request]], Iterable[dict[int, str]]]
"""Makes responses: index of a request -> response, of several at a time, until all are there."""


def read_problems(settings: Eval) -> dict[str, list[Problem]]:
    """Suite name -> its problems, read on rank 0 and handed to all. Collective.

    Raises UserError, also where programs could not be boxed in: before anything long has run.
    """
    data_dir = None if settings.data_dir is None else Path(settings.data_dir).expanduser()
    suites = expand(settings.suites)

    def rows() -> dict[str, list[Problem]]:
        if not settings.allow_unsandboxed and any(TASKS[suite].kind == "code" for suite in suites):
            sandbox.isolation()
        return {suite: TASKS[suite].rows(data_dir, settings.limit) for suite in suites}

    return on_rank0(rows)


def score(
    engine: Engine,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    problems: dict[str, list[Problem]],
    settings: Eval,
    folder: Path,
    identity: dict,
) -> dict[str, dict]:
    """Generate and grade every suite with `model`; collective. See `score_responses`."""
    model.eval()

    def responses(suite: Suite, requests: list[Request]) -> Iterable[dict[int, str]]:
        prompts = encode(tokenizer, [request.prompt for request in requests])
        if full := too_long(model, prompts):
            say(
                f"warning: {suite.name}: {len(full)} of {len(prompts)} prompts fill the model's context: no response"
            )
        return generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=settings.max_new_tokens or suite.max_new_tokens,
            batch_size=settings.batch_size,
            device=engine.device,
            sharded=engine.sharded,
            stops=suite.stops if settings.prompt == "literature" else (),
            temperature=settings.temperature,
            seeds=[request.seed for request in requests],
        )

    return score_responses(responses, problems, settings, folder, identity)


def score_responses(
    responses: Responses,
    problems: dict[str, list[Problem]],
    settings: Eval,
    folder: Path,
    identity: dict,
) -> dict[str, dict]:
    """Get and grade the responses to every suite; collective. Rank 0 keeps each in `folder`/generations.jsonl.

    Started again it gets those that are not there yet. Responses that another model or other settings made are set
    aside, as generations.previous.jsonl.

    Args:
        identity: what the responses depend on besides `settings`: model, adapter, dtype.

    Returns:
        Suite -> the strict grader's eval.grading.summary, and {literature: the literature's, prompt, max_new_tokens,
        temperature, empty (responses), data_sha256, seconds} and, of code, isolation: verdicts by what boxed them in.
    """
    made_with = identity | {
        key: getattr(settings, key) for key in ("prompt", "max_new_tokens", "temperature", "seed")
    }
    kept = on_rank0(lambda: _open(folder, made_with)) if problems else {}
    scores = {}
    for name, rows in problems.items():
        start, suite = time.perf_counter(), TASKS[name]
        wanted = [
            Request(row, sample, *_ask(suite, row, sample, settings))
            for row in rows
            for sample in range(settings.samples)
        ]
        requests = [
            request for request in wanted if (name, request.problem.id, request.sample) not in kept
        ]
        for part in _shown(
            responses(suite, requests) if requests else [], suite, requests, len(wanted)
        ):
            found = {
                (name, requests[i].problem.id, requests[i].sample): output
                for i, output in part.items()
            }
            kept |= found
            on_rank0(lambda found=found: _keep(folder, found))
        outputs = [kept[name, request.problem.id, request.sample] for request in wanted]
        grades = partial(_grade, suite, wanted, outputs, settings, folder)
        scores[name] = on_rank0(grades) | {
            "prompt": settings.prompt,
            "max_new_tokens": settings.max_new_tokens or suite.max_new_tokens,
            "temperature": settings.temperature,
            "empty": sum(not output for output in outputs),
            "data_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
            "seconds": time.perf_counter() - start,
        }
    return scores


def _ask(suite: Suite, problem: Problem, sample: int, settings: Eval) -> tuple[str, int]:
    """The prompt of one response, and its seed."""
    asked = (
        prompt(problem.question)
        if settings.prompt == "recipe"
        else suite.literature_prompt(problem.question)
    )
    digest = hashlib.sha256(f"{settings.seed} {problem.id} {sample}".encode()).digest()
    return asked, int.from_bytes(digest[:8], "big")


def _shown(
    parts: Iterable[dict[int, str]], suite: Suite, requests: list[Request], total: int
) -> Iterator[dict[int, str]]:
    """`parts`, with a progress bar that shows the accuracy so far of answers; programs are graded at the end."""
    graded: list[bool] = []
    rank = dist.get_rank() if dist.is_initialized() else 0
    done = total - len(requests)

    def note() -> str:
        return f"accuracy {100 * sum(graded) / len(graded):.1f} %" if graded else ""

    for part in progress_of(parts, done, total, suite.name, rank, note):
        if rank == 0 and suite.kind == "answer":
            graded += [
                suite.grade(output, requests[i].problem, "strict") for i, output in part.items()
            ]
        yield part


def _open(folder: Path, made_with: dict) -> dict[tuple[str, str, int], str]:
    """The responses that `folder` holds, if they were made with the same: (suite, problem, sample) -> response."""
    folder.mkdir(parents=True, exist_ok=True)
    path, note = folder / GENERATIONS, folder / MADE_WITH
    if path.is_file() and not (
        note.is_file() and json.loads(note.read_text()) == json.loads(json.dumps(made_with))
    ):
        path.replace(folder / "generations.previous.jsonl")
        print(
            f"{path} was made with other settings, and is generations.previous.jsonl now",
            flush=True,
        )
    write_json(note, made_with)
    rows = read_generations(path) if path.is_file() else []
    write_text(
        path, "".join(_line(row) for row in rows)
    )  # without a last line that a kill cut short
    return {(row["suite"], row["id"], row["sample"]): row["output"] for row in rows}


def read_generations(path: Path) -> list[dict]:
    """The rows of a file of responses; a last line without its end, which a kill cut short, is left out.

    Raises UserError, naming the line, for any other that is not a JSON object.
    """
    rows = []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"line {number} of {path} is not JSON ({error}); mend or remove it"
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"line {number} of {path} is not an object with fields; mend or remove it"
            )
        rows.append(row)
    return rows


def _line(row: dict) -> str:
    return (
        json.dumps(row, ensure_ascii=True) + "\n"
    )  # escaped: a response may hold half of a surrogate pair


def _keep(folder: Path, found: dict[tuple[str, str, int], str]) -> None:
    with (folder / GENERATIONS).open("a", encoding="utf-8") as file:
        for (suite, problem, sample), output in found.items():
            file.write(_line({"suite": suite, "id": problem, "sample": sample, "output": output}))
        file.flush()
        os.fsync(file.fileno())


def _grade(
    suite: Suite, requests: list[Request], outputs: list[str], settings: Eval, folder: Path
) -> dict:
    """Grade one suite on rank 0, note each grade beside its response, and sum up."""
    problems = [request.problem for request in requests]
    options = {"timeout": settings.timeout, "allow_unsandboxed": settings.allow_unsandboxed}
    grades = list(
        progress(grade(suite, problems, outputs, **options), len(outputs), f"grade {suite.name}", 0)
    )
    noted = []
    for request, output, of in zip(requests, outputs, grades, strict=True):
        row = {"suite": suite.name, "id": request.problem.id, "sample": request.sample}
        row |= {
            "question": request.problem.question,
            "reference": request.problem.reference,
            "output": output,
        }
        row |= {grader: given.passed for grader, given in of.items()}
        if suite.kind == "code":
            row |= {"reason": of["strict"].reason, "isolation": of["strict"].isolation}
        noted.append(row)
    others = [row for row in read_generations(folder / GENERATIONS) if row["suite"] != suite.name]
    write_text(folder / GENERATIONS, "".join(map(_line, [*others, *noted])))
    found = {
        grader: _summary([of[grader].passed for of in grades], settings.samples)
        for grader in GRADERS
    }
    boxes = (
        {"isolation": dict(Counter(of["strict"].isolation for of in grades))}
        if suite.kind == "code"
        else {}
    )
    return found["strict"] | {"grader": "strict", "literature": found["literature"]} | boxes


def _summary(passed: list[bool], samples: int) -> dict:
    return summary([passed[start : start + samples] for start in range(0, len(passed), samples)])


def describe(scores: dict[str, dict]) -> str:
    """A Markdown table, one row a suite: both graders' accuracies in percent, with the 95 % interval and n."""
    lines = [
        "| suite | strict (%) | 95 % interval | literature (%) | n | prompt |",
        "|---|---|---|---|---|---|",
    ]
    for suite, of in scores.items():
        low, high = of["interval"]
        literature = of["literature"]["accuracy"]
        cells = [
            suite,
            f"{100 * of['accuracy']:.1f}",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{100 * literature:.1f}",
        ]
        lines.append(f"| {' | '.join([*cells, str(of['n']), of['prompt']])} |")
        for k, value in of.get("pass_at", {}).items():
            lines.append(
                f"| {suite} pass@{k} | {100 * value:.1f} | | | {of['n']} | {of['prompt']} |"
            )
    commonsense = [scores[suite] for suite in expand(["commonsense"]) if suite in scores]
    if len(commonsense) == len(expand(["commonsense"])):
        means = [
            sum(part["accuracy"] for part in of) / 8
            for of in (commonsense, [of["literature"] for of in commonsense])
        ]
        lines.append(f"| mean of the eight | {100 * means[0]:.1f} | | {100 * means[1]:.1f} | | |")
    return "\n".join(lines)
