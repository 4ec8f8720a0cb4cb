"""Score the model behind an OpenAI-compatible server, such as vLLM's."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch.distributed as dist

from eval.generation.decoding import Completion
from eval.generation.server import SAMPLING, request_completions
from eval.tasks.base import Benchmark, Problem
from launch.config.schema import Eval
from launch.run.results import Score
from launch.runtime import watchdog
from launch.runtime.errors import UserError
from launch.scoring.requests import Request, get_new_tokens, get_stops
from launch.scoring.score import score_responses


def evaluate_server(
    url: str,
    model: str,
    concurrency: int,
    problems: Mapping[str, list[Problem]],
    settings: Eval,
    folder: Path,
) -> tuple[dict, dict[str, Score]]:
    """Score the model that the server at `url` calls `model`. Collective.

    Args:
        url: up to and with /v1.
        concurrency: requests to the server at once.

    Returns:
        What the responses depend on besides `settings`, as JSON values; and the scores.

    Raises:
        EvalError: the server refuses, or does not answer.
        UserError: the prompt is chat, or there are several ranks.
    """
    if dist.get_world_size() > 1:
        raise UserError(
            f"--backend openai: each of {dist.get_world_size()} ranks would send every request; "
            "start one process, by python, and raise --concurrency"
        )

    def make_responses(
        benchmark: Benchmark, requests: list[Request]
    ) -> Iterable[dict[int, Completion | None]]:
        return request_completions(
            url,
            model,
            [request.prompt for request in requests],
            max_new_tokens=get_new_tokens(benchmark, settings),
            stops=get_stops(benchmark, settings),
            temperature=settings.temperature,
            seeds=[request.seed for request in requests],
            concurrency=concurrency,
        )

    if settings.prompt == "chat":
        raise UserError(
            "--prompt: chat is rendered by the tokenizer's template, which a server does not show; "
            "score the model with --backend transformers"
        )
    # A server does not say which weights it has: a name and an address are all there is.
    identity = {
        "base": {"name": model, "weights_sha256": None},
        "url": url,
        "sampling": SAMPLING,  # earlier versions left it to the server
    }
    watchdog.set_phase("scoring", timed=True)
    return identity, score_responses(make_responses, problems, settings, folder, identity)
