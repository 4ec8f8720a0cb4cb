"""Score a model on benchmarks: get its responses, grade them, and add up the grades."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from eval.generation.decoding import Completion, find_end_tokens
from eval.generation.generate import generate_responses
from eval.grading import Grade, grade_responses, make_grade_fields, summarise_grades
from eval.sandbox.box import choose_box
from eval.tasks import BENCHMARKS, expand_groups
from eval.tasks.base import Benchmark, Grader, Problem
from launch.config.schema import Eval
from launch.data.chat.template import ChatTemplate, hash_template, load_template
from launch.data.chat.tokenize import encode_question
from launch.data.tokenize import encode_texts
from launch.engines.base import Engine
from launch.models.check import check_token_ids, get_num_positions, get_num_rows
from launch.run.progress import show_progress, show_progress_of_parts
from launch.run.results import Score
from launch.runtime.distributed import print_rank0, run_on_rank0
from launch.scoring.requests import (
    Request,
    get_new_tokens,
    get_stops,
    make_requests,
    naming_benchmark,
)
from launch.scoring.responses import (
    GENERATIONS,
    Response,
    ResponseKey,
    Wanted,
    append_responses,
    count_cut_responses,
    make_row,
    open_responses,
    write_graded,
)
from launch.training.kernels import find_longrope_limit

# Fields of Eval that change responses.
DECODING = ("prompt", "max_new_tokens", "temperature", "seed")


MakeResponses = Callable[[Benchmark, list[Request]], Iterable[dict[int, Completion | None]]]
"""Makes the responses to requests of one benchmark, several at a time: index -> response.

None stands for the response to a prompt that is too long for the model.
"""

Grades = dict[Grader, Grade]
"""The grades of one response."""


def read_problems(settings: Eval) -> dict[str, list[Problem]]:
    """Read the problems of every benchmark on rank 0, and hand them to all ranks. Collective.

    Prints a line where they are more or fewer than the benchmark has, unless there is a limit.

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
        problems = {}
        for name in names:
            problems[name] = BENCHMARKS[name].read_problems(data_dir, settings.limit)
            num_problems, official = len(problems[name]), BENCHMARKS[name].num_problems
            if settings.limit is None and num_problems != official:
                print_rank0(
                    f"{name}: {num_problems} problems from {data_dir or 'the hub'}; "
                    f"the benchmark has {official}"
                )
        return problems

    return run_on_rank0(read)


def check_prompts(
    problems: Mapping[str, list[Problem]], settings: Eval, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Try every question in the chat template: a wrong one would end the scoring hours later.

    Raises:
        UserError: there is no template, or it refuses a question.
    """
    if settings.prompt != "chat" or not problems:
        return
    template = load_template(settings.chat_template, tokenizer, "eval.chat_template")
    for name, of_benchmark in problems.items():
        make_requests(BENCHMARKS[name], of_benchmark, settings, template)


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
    # generation_config.json names some of them too.
    end_tokens = find_end_tokens(model, tokenizer)
    template = None
    if settings.prompt == "chat":
        template = load_template(settings.chat_template, tokenizer, "eval.chat_template")
        if template.end_token not in end_tokens:
            end_tokens.append(template.end_token)
    identity = identity | {"end_tokens": end_tokens}

    def make_responses(
        benchmark: Benchmark, requests: list[Request]
    ) -> Iterable[dict[int, Completion | None]]:
        if template is None:
            prompts = encode_texts(tokenizer, [request.prompt for request in requests])
        else:
            with naming_benchmark(benchmark):
                prompts = [encode_question(one.problem.question, template) for one in requests]
        largest = max((max(ids) for ids in prompts if ids), default=0)
        check_token_ids(largest, get_num_rows(model), tokenizer, "model")
        _warn_of_longrope(benchmark, model, max(map(len, prompts)), settings)
        return generate_responses(
            model,
            tokenizer,
            prompts,
            num_positions=get_num_positions(model.config),
            max_new_tokens=get_new_tokens(benchmark, settings),
            batch_size=settings.batch_size,
            device=engine.device,
            sharded=engine.sharded,
            end_tokens=end_tokens,
            stops=get_stops(benchmark, settings),
            temperature=settings.temperature,
            seeds=[request.seed for request in requests],
        )

    return score_responses(make_responses, problems, settings, folder, identity, template)


def _warn_of_longrope(benchmark: Benchmark, model: nn.Module, longest: int, settings: Eval) -> None:
    """Print a line where the responses may depend on which prompts run together.

    Args:
        longest: tokens of the longest prompt.
    """
    limit, context = find_longrope_limit(model.config), get_num_positions(model.config)
    longest += get_new_tokens(benchmark, settings)
    if limit is not None and settings.batch_size > 1 and min(longest, context or longest) > limit:
        print_rank0(
            f"{benchmark.name}: above {limit} tokens a row of this base (longrope) changes the "
            "rotary frequencies of all rows in its batch, and may change their responses; with a "
            "batch size of 1 none does"
        )


def score_responses(
    make_responses: MakeResponses,
    problems: Mapping[str, list[Problem]],
    settings: Eval,
    folder: Path,
    identity: dict,
    template: ChatTemplate | None = None,
) -> dict[str, Score]:
    """Get the responses to every benchmark and grade them. Collective.

    Rank 0 keeps each response in `folder`/generations.jsonl as soon as it is there, so a new start
    asks only for those that are missing. Responses that another model or other settings made, or to
    another prompt, are set aside (see launch.scoring.responses).

    Args:
        identity: what the responses depend on besides `settings`: model, adapter, dtype.
        template: for prompt chat.

    Returns:
        Name of the benchmark -> its score. Beyond the fields of Score it has max_new_tokens,
        temperature, empty (number of empty responses), seconds, of prompt chat
        chat_template_sha256 and end_of_turn and, of programs, isolation: what isolated them ->
        number of programs.

    Raises:
        UserError: a line of generations.jsonl is no response.
    """
    if not problems:
        return {}
    made_with = identity | {field: getattr(settings, field) for field in DECODING}
    requests = {
        name: make_requests(BENCHMARKS[name], of_benchmark, settings, template)
        for name, of_benchmark in problems.items()
    }
    wanted = {}
    for request in chain.from_iterable(requests.values()):
        wanted[request.key] = Wanted(request.sha256, request.problem.question)
    kept = run_on_rank0(lambda: open_responses(folder, made_with, wanted))
    if kept:
        print_rank0(_describe_kept(len(kept), folder, identity))
    scores: dict[str, Score] = {}
    chat = {}
    if template is not None:
        chat = {
            "chat_template_sha256": hash_template(template.text),
            "end_of_turn": template.end_of_turn,
        }
    # Of generations.jsonl, with grades. Only rank 0, which writes them, has them.
    rows: list[dict] = []
    for name, of_benchmark in problems.items():
        start = time.perf_counter()
        benchmark = BENCHMARKS[name]
        responses, grades = _get_responses(
            make_responses, benchmark, requests[name], kept, settings, folder
        )
        run_on_rank0(
            partial(_grade_remaining, benchmark, requests[name], responses, grades, settings)
        )
        if dist.get_rank() == 0:
            rows += _make_rows(benchmark, requests[name], responses, grades)
        totals = run_on_rank0(
            partial(_summarise_grades, benchmark, requests[name], grades, settings.samples)
        )
        scores[name] = Score(
            **totals,
            empty=sum(not response.output for response in responses.values()),
            **count_cut_responses(
                (request.problem.id, responses[request.key]) for request in requests[name]
            ),
            **chat,
            prompt=settings.prompt,
            max_new_tokens=get_new_tokens(benchmark, settings),
            temperature=settings.temperature,
            data_sha256=hashlib.sha256(json.dumps(of_benchmark).encode()).hexdigest(),
            seconds=time.perf_counter() - start,
        )
    run_on_rank0(lambda: write_graded(folder, rows))
    return scores


def _describe_kept(num_kept: int, folder: Path, identity: dict) -> str:
    line = f"{folder / GENERATIONS}: {num_kept} responses of an earlier start are kept"
    if identity["base"]["weights_sha256"] is None:
        line += (
            "; a server does not say which weights it has: choose another --output if they changed"
        )
    return line


def _get_responses(
    make_responses: MakeResponses,
    benchmark: Benchmark,
    requests: Sequence[Request],
    kept: Mapping[ResponseKey, Response],
    settings: Eval,
    folder: Path,
) -> tuple[dict[ResponseKey, Response], dict[ResponseKey, Grades]]:
    """Get the responses to all `requests`, and write those that were missing. Collective.

    Answers are graded as they arrive, for the accuracy that is shown beside the progress. Programs
    take seconds each, for which generation would wait: they are graded at the end, and so are the
    responses of earlier starts.

    Returns:
        The response to every request, on all ranks; and the grades that were given, on rank 0.
    """
    responses = {request.key: kept[request.key] for request in requests if request.key in kept}
    missing = [request for request in requests if request.key not in responses]
    grades: dict[ResponseKey, Grades] = {}

    def store(part: Mapping[int, Completion | None]) -> None:
        # Written before it is graded: a response costs more than its grade.
        arrived = [missing[i] for i in part]
        append_responses(folder, {request.key: responses[request.key] for request in arrived})
        if benchmark.kind == "answer":
            grades.update(_grade_requests(benchmark, arrived, responses, settings))

    def describe_accuracy() -> str:
        passed = [given["strict"].passed for given in grades.values()]
        return f"accuracy {100 * sum(passed) / len(passed):.1f} %" if passed else ""

    parts = make_responses(benchmark, missing) if missing else []
    for part in show_progress_of_parts(
        parts,
        len(responses),
        len(requests),
        benchmark.name,
        dist.get_rank(),
        describe_accuracy,
        "responses",
    ):
        for i, completion in part.items():
            responses[missing[i].key] = _make_response(completion, missing[i])
        run_on_rank0(partial(store, part))
    return responses, grades


def _make_response(completion: Completion | None, request: Request) -> Response:
    """Make the response to a request; `completion` is None if the prompt is too long."""
    if completion is None:
        return Response("", overlong=True, request_sha256=request.sha256)
    return Response(completion.text, request_sha256=request.sha256, truncated=completion.truncated)


def _grade_requests(
    benchmark: Benchmark,
    requests: Sequence[Request],
    responses: Mapping[ResponseKey, Response],
    settings: Eval,
) -> Iterator[tuple[ResponseKey, Grades]]:
    """Grade the responses to `requests`, in order."""
    box = choose_box(settings.allow_unsandboxed) if benchmark.kind == "code" else None
    grades = grade_responses(
        benchmark,
        [request.problem for request in requests],
        [responses[request.key].output for request in requests],
        timeout=settings.timeout,
        box=box,
    )
    yield from zip((request.key for request in requests), grades, strict=True)


def _grade_remaining(
    benchmark: Benchmark,
    requests: Sequence[Request],
    responses: Mapping[ResponseKey, Response],
    grades: dict[ResponseKey, Grades],
    settings: Eval,
) -> None:
    """Add to `grades` those of the responses that have none yet, while the progress is shown."""
    remaining = [request for request in requests if request.key not in grades]
    if remaining:
        graded = _grade_requests(benchmark, remaining, responses, settings)
        grades.update(
            show_progress(graded, len(remaining), f"grade {benchmark.name}", 0, "responses")
        )


def _make_rows(
    benchmark: Benchmark,
    requests: Sequence[Request],
    responses: Mapping[ResponseKey, Response],
    grades: Mapping[ResponseKey, Grades],
) -> list[dict]:
    """Make the graded rows of generations.jsonl, in the order of `requests`."""
    rows = []
    for request in requests:
        given = grades[request.key]
        fields = {"question": request.problem.question, "reference": request.problem.reference}
        fields |= make_grade_fields(benchmark, given)
        rows.append(make_row(request.key, responses[request.key], fields))
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
    by_problem = [in_order[i : i + samples] for i in range(0, len(in_order), samples)]
    found = summarise_grades(by_problem) | {"grader": "strict"}
    if benchmark.kind == "code":
        found["isolation"] = dict(Counter(given["strict"].isolation for given in in_order))
    return found
