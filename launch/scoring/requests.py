"""The responses that a scoring asks a model for, with a hash of what each is made from."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from eval.tasks.base import Benchmark, Problem
from launch.config.schema import Eval
from launch.data.chat.messages import MessagesError
from launch.data.chat.template import ChatTemplate
from launch.data.chat.tokenize import ask
from launch.data.prompts import format_prompt
from launch.runtime.errors import UserError
from launch.scoring.responses import ResponseKey


class Request(NamedTuple):
    """One response that is to be made."""

    benchmark: str
    problem: Problem
    sample: int  # from 0
    prompt: str
    seed: int
    sha256: str  # of the prompt and of what decodes the response: it is kept under this hash

    @property
    def key(self) -> ResponseKey:
        """The name under which the response is kept."""
        return self.benchmark, self.problem.id, self.sample


def make_requests(
    benchmark: Benchmark,
    problems: Sequence[Problem],
    settings: Eval,
    template: ChatTemplate | None,
) -> list[Request]:
    """Make the requests of one benchmark: all samples of a problem, then those of the next.

    Args:
        template: for prompt chat.

    Raises:
        UserError: the chat template refuses a question.
    """
    format_question = choose_prompt(benchmark, settings, template)
    requests = []
    for problem in problems:
        with naming_benchmark(benchmark):
            prompt = format_question(problem.question)
        for sample in range(settings.samples):
            # By name and not by place, so that a limit or a new start changes no response.
            digest = hashlib.sha256(f"{settings.seed} {problem.id} {sample}".encode()).digest()
            seed = int.from_bytes(digest[:8], "big")
            made_from = [
                prompt,
                get_new_tokens(benchmark, settings),
                get_stops(benchmark, settings),
                settings.temperature,
                seed if settings.temperature else None,
            ]
            hashed = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
            requests.append(Request(benchmark.name, problem, sample, prompt, seed, hashed))
    return requests


def choose_prompt(
    benchmark: Benchmark, settings: Eval, template: ChatTemplate | None
) -> Callable[[str], str]:
    """Return what makes a prompt of a question, see `make_requests`."""
    match settings.prompt:
        case "recipe":
            return format_prompt
        case "chat":
            return lambda question: template.render(ask(question), generate=True)
        case _:
            return benchmark.format_literature_prompt


@contextlib.contextmanager
def naming_benchmark(benchmark: Benchmark) -> Iterator[None]:
    """Let errors of a chat template be the user's, with the benchmark's name."""
    try:
        yield
    except MessagesError as error:
        raise UserError(f"eval.prompt: chat, {benchmark.name}: {error.what}") from None


def get_new_tokens(benchmark: Benchmark, settings: Eval) -> int:
    """Return the most new tokens of a response: as set, or as published."""
    return settings.max_new_tokens or benchmark.max_new_tokens


def get_stops(benchmark: Benchmark, settings: Eval) -> tuple[str, ...]:
    """Return the strings that end a response. The published ones belong to the published prompt."""
    return benchmark.stops if settings.prompt == "literature" else ()
