"""Score a model on benchmarks: what is asked, how it is graded, and what the grades add up to."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from eval.generation.generate import find_overlong_prompts, generate_responses
from eval.grading import Grade, grade_responses, summarise_passes
from eval.sandbox.box import choose_box
from eval.tasks import BENCHMARKS, expand_groups
from eval.tasks.base import GRADERS, Benchmark, Grader, Problem
from launch.config.schema import Eval
from launch.data.prompts import format_prompt
from launch.data.tokenize import encode_texts
from launch.engines.base import Engine
from launch.run.progress import show_progress, show_progress_of_parts
from launch.run.results import Score
from launch.runtime.distributed import print_rank0, run_on_rank0
from launch.scoring.responses import ResponseKey, append_responses, open_responses, write_graded

# Fields of Eval that change responses.
DECODING = ("prompt", "max_new_tokens", "temperature", "seed")


class Request(NamedTuple):
    """One response that is to be made."""

    benchmark: str
    problem: Problem
    sample: int  # from 0
    prompt: str
    seed: int

    @property
    def key(self) -> ResponseKey:
        """The name under which the response is kept."""
        return self.benchmark, self.problem.id, self.sample


MakeResponses = Callable[[Benchmark, list[Request]], Iterable[dict[int, str]]]
"""Makes the responses to requests of one benchmark, several at a time: index -> response."""

Grades = dict[Grader, Grade]
"""The grades of one response."""


def read_problems(settings: Eval) -> dict[str, list[Problem]]:
    """Read the problems of every benchmark on rank 0, and hand them to all ranks. Collective.

    Returns:
        Name of the benchmark -> its problems.

    Raises:
        UserError: a benchmark cannot be read, or nothing here can isolate its programs.
    """
    data_dir = None if settings.data_dir is None else Path(settings.data_dir).expanduser()
    names = expand_groups(settings.suites)
    has_programs = any(BENCHMARKS[name].kind == "code" for name in names)

    def read() -> dict[str, list[Problem]]:
        if has_programs and not settings.allow_unsandboxed:
            # Raises now what would otherwise end the scoring hours later.
            choose_box()
        return {name: BENCHMARKS[name].read_problems(data_dir, settings.limit) for name in names}

    return run_on_rank0(read)


def score_benchmarks(
    engine: Engine,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    problems: Mapping[str, list[Problem]],
    settings: Eval,
    folder: Path,
    identity: dict,
) -> dict[str, Score]:
    """Generate responses with `model` and grade them. Collective; see `score_responses`.

    Args:
        model: able to run forward passes: within the engine's `inference_mode`, or in training.
    """
    model.eval()

    def make_responses(benchmark: Benchmark, requests: list[Request]) -> Iterable[dict[int, str]]:
        prompts = encode_texts(tokenizer, [request.prompt for request in requests])
        if full := find_overlong_prompts(model, prompts):
            # Their responses are empty, and so graded as wrong.
            print_rank0(
                f"warning: {benchmark.name}: {len(full)} of {len(prompts)} prompts fill the "
                "model's context: no response"
            )
        return generate_responses(
            model,
            tokenizer,
            prompts,
            max_new_tokens=settings.max_new_tokens or benchmark.max_new_tokens,
            batch_size=settings.batch_size,
            device=engine.device,
            sharded=engine.sharded,
            stops=benchmark.stops if settings.prompt == "literature" else (),
            temperature=settings.temperature,
            seeds=[request.seed for request in requests],
        )

    return score_responses(make_responses, problems, settings, folder, identity)


def score_responses(
    make_responses: MakeResponses,
    problems: Mapping[str, list[Problem]],
    settings: Eval,
    folder: Path,
    identity: dict,
) -> dict[str, Score]:
    """Get the responses to every benchmark and grade them. Collective.

    Rank 0 keeps each response in `folder`/generations.jsonl as soon as it is there, so a new start
    asks only for those that are missing. Responses that another model or other settings made are
    set aside (see launch.scoring.responses).

    Args:
        identity: what the responses depend on besides `settings`: model, adapter, dtype.

    Returns:
        Name of the benchmark -> its score. Beyond the fields of Score it has max_new_tokens,
        temperature, empty (number of empty responses), seconds and, of programs, isolation:
        what isolated them -> number of programs.
    """
    if not problems:
        return {}
    made_with = identity | {field: getattr(settings, field) for field in DECODING}
    kept = run_on_rank0(lambda: open_responses(folder, made_with))
    scores: dict[str, Score] = {}
    # Of generations.jsonl, with grades. Only rank 0, which writes them, has them.
    rows: list[dict] = []
    for name, of_benchmark in problems.items():
        start = time.perf_counter()
        benchmark = BENCHMARKS[name]
        requests = _make_requests(benchmark, of_benchmark, settings)
        outputs, grades = _get_responses(
            make_responses, benchmark, requests, kept, settings, folder
        )
        run_on_rank0(partial(_grade_remaining, benchmark, requests, outputs, grades, settings))
        if dist.get_rank() == 0:
            rows += _make_rows(benchmark, requests, outputs, grades)
        totals = run_on_rank0(
            partial(_summarise_grades, benchmark, requests, grades, settings.samples)
        )
        scores[name] = Score(
            **totals,
            prompt=settings.prompt,
            max_new_tokens=settings.max_new_tokens or benchmark.max_new_tokens,
            temperature=settings.temperature,
            empty=sum(not output for output in outputs.values()),
            data_sha256=hashlib.sha256(json.dumps(of_benchmark).encode()).hexdigest(),
            seconds=time.perf_counter() - start,
        )
    run_on_rank0(lambda: write_graded(folder, rows))
    return scores


def _make_requests(
    benchmark: Benchmark, problems: Sequence[Problem], settings: Eval
) -> list[Request]:
    """Make the requests of one benchmark: all samples of a problem, then those of the next."""
    format_question = (
        format_prompt if settings.prompt == "recipe" else benchmark.format_literature_prompt
    )
    requests = []
    for problem in problems:
        prompt = format_question(problem.question)
        for sample in range(settings.samples):
            # By name and not by place, so that a limit or a new start changes no response.
            digest = hashlib.sha256(f"{settings.seed} {problem.id} {sample}".encode()).digest()
            seed = int.from_bytes(digest[:8], "big")
            requests.append(Request(benchmark.name, problem, sample, prompt, seed))
    return requests


def _get_responses(
    make_responses: MakeResponses,
    benchmark: Benchmark,
    requests: Sequence[Request],
    kept: Mapping[ResponseKey, str],
    settings: Eval,
    folder: Path,
) -> tuple[dict[ResponseKey, str], dict[ResponseKey, Grades]]:
    """Get the responses to all `requests`, and write those that were missing. Collective.

    Answers are graded as they arrive, for the accuracy that the progress bar shows. Programs take
    seconds each, for which generation would wait: they are graded at the end, and so are the
    responses of earlier starts.

    Returns:
        The response to every request, on all ranks; and the grades that were given, on rank 0.
    """
    outputs = {request.key: kept[request.key] for request in requests if request.key in kept}
    missing = [request for request in requests if request.key not in outputs]
    grades: dict[ResponseKey, Grades] = {}

    def store(part: Mapping[int, str]) -> None:
        # Written before it is graded: a response costs more than its grade.
        append_responses(folder, {missing[i].key: output for i, output in part.items()})
        if benchmark.kind == "answer":
            arrived = [missing[i] for i in part]
            grades.update(_grade_requests(benchmark, arrived, outputs, settings))

    def describe_accuracy() -> str:
        passed = [given["strict"].passed for given in grades.values()]
        return f"accuracy {100 * sum(passed) / len(passed):.1f} %" if passed else ""

    parts = make_responses(benchmark, missing) if missing else []
    for part in show_progress_of_parts(
        parts, len(outputs), len(requests), benchmark.name, dist.get_rank(), describe_accuracy
    ):
        outputs.update({missing[i].key: output for i, output in part.items()})
        run_on_rank0(partial(store, part))
    return outputs, grades


def _grade_requests(
    benchmark: Benchmark,
    requests: Sequence[Request],
    outputs: Mapping[ResponseKey, str],
    settings: Eval,
) -> Iterator[tuple[ResponseKey, Grades]]:
    """Grade the responses to `requests`, in order."""
    box = choose_box(settings.allow_unsandboxed) if benchmark.kind == "code" else None
    grades = grade_responses(
        benchmark,
        [request.problem for request in requests],
        [outputs[request.key] for request in requests],
        timeout=settings.timeout,
        box=box,
    )
    yield from zip((request.key for request in requests), grades, strict=True)


def _grade_remaining(
    benchmark: Benchmark,
    requests: Sequence[Request],
    outputs: Mapping[ResponseKey, str],
    grades: dict[ResponseKey, Grades],
    settings: Eval,
) -> None:
    """Add to `grades` those of the responses that have none yet, with a progress bar."""
    remaining = [request for request in requests if request.key not in grades]
    if remaining:
        graded = _grade_requests(benchmark, remaining, outputs, settings)
        grades.update(show_progress(graded, len(remaining), f"grade {benchmark.name}", 0))


def _make_rows(
    benchmark: Benchmark,
    requests: Sequence[Request],
    outputs: Mapping[ResponseKey, str],
    grades: Mapping[ResponseKey, Grades],
) -> list[dict]:
    """Make the graded rows of generations.jsonl, in the order of `requests`."""
    rows = []
    for request in requests:
        given = grades[request.key]
        row = {
            "suite": request.benchmark,
            "id": request.problem.id,
            "sample": request.sample,
            "question": request.problem.question,
            "reference": request.problem.reference,
            "output": outputs[request.key],
        }
        row |= {grader: given[grader].passed for grader in GRADERS}
        if benchmark.kind == "code":
            # Why the program failed, and what isolated it.
            strict = given["strict"]
            row |= {"reason": strict.reason, "isolation": strict.isolation}
        rows.append(row)
    return rows


def _summarise_grades(
    benchmark: Benchmark,
    requests: Sequence[Request],
    grades: Mapping[ResponseKey, Grades],
    samples: int,
) -> dict:
    """Return the fields of Score that follow from the grades, with isolation of programs."""
    # In the order of requests the samples of one problem are neighbours.
    in_order = [grades[request.key] for request in requests]
    totals = {}
    for grader in GRADERS:
        passed = [given[grader].passed for given in in_order]
        by_problem = [passed[i : i + samples] for i in range(0, len(passed), samples)]
        totals[grader] = summarise_passes(by_problem)
    found = totals["strict"] | {"grader": "strict", "literature": totals["literature"]}
    if benchmark.kind == "code":
        found["isolation"] = dict(Counter(given["strict"].isolation for given in in_order))
    return found


def render_scores(scores: Mapping[str, Score]) -> str:
    """Render scores as a Markdown table, one row a benchmark, accuracies in percent.

    Where all eight commonsense benchmarks are there, a last row has their unweighted mean.
    """
    lines = [
        "| suite | strict (%) | 95 % interval | literature (%) | n | prompt |",
        "|---|---|---|---|---|---|",
    ]
    for name, score in scores.items():
        low, high = score.interval
        lines.append(
            f"| {name} | {100 * score.accuracy:.1f} | {100 * low:.1f} to {100 * high:.1f} | "
            f"{100 * score.literature.accuracy:.1f} | {score.n} | {score.prompt} |"
        )
        for k, value in (score.pass_at or {}).items():
            lines.append(
                f"| {name} pass@{k} | {100 * value:.1f} | | | {score.n} | {score.prompt} |"
            )
    # LLM-Adapters and later papers quote this mean.
    commonsense = expand_groups(["commonsense"])
    if all(name in scores for name in commonsense):
        strict = [scores[name].accuracy for name in commonsense]
        literature = [scores[name].literature.accuracy for name in commonsense]
        lines.append(
            f"| mean of the eight | {100 * (sum(strict) / 8):.1f} | | "
            f"{100 * (sum(literature) / 8):.1f} | | |"
        )
    return "\n".join(lines)
