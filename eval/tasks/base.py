"""The records that describe a benchmark to the rest of the evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

Grader = Literal["strict", "literature"]
"""A rule that says whether a response is right.

"strict" is meant to be right. "literature" is the rule that papers used, with its quirks.
"""
GRADERS: tuple[Grader, ...] = ("strict", "literature")

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


class CodeTests(TypedDict):
    """The tests of a programming problem. See eval.sandbox.check.Job."""

    entry_point: str  # name of the function that the tests call
    setup: str
    tests: str
    prompt: str  # a signature that a response may continue; empty if there is none
    in_box: bool


class Problem(NamedTuple):
    """One problem. Scores record a hash of these fields: their order and values must not change."""

    id: str
    question: str  # the instruction that a prompt template takes
    reference: str  # the bare final answer; for code, the data set's own program
    tests: CodeTests | None = None  # for code only
    plain: str = ""  # the data set's own text, if `question` adds words to it


class Benchmark(NamedTuple):
    """One benchmark."""

    name: str
    kind: Literal["answer", "code"]  # code runs in eval.sandbox.check
    num_problems: int  # of the official test set
    read_problems: Callable[[Path | None, int | None], list[Problem]]  # data folder, limit
    format_literature_prompt: Callable[[str], str]  # the published prompt for a question
    stops: tuple[str, ...]  # published strings that end a response to the published prompt
    max_new_tokens: int  # published
    grade: Callable[[str, Problem, Grader], bool] | None = None  # for answers
    finds_answer: Callable[[str, Grader], bool] | None = None  # for answers, right or wrong
    extract_program: Callable[[str, Problem, Grader], str] | None = None  # for code
    group: str | None = None  # a name that stands for several benchmarks
