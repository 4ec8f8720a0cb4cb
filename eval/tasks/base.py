"""What a benchmark is to the rest of the evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

Grader = Literal["strict", "literature"]
GRADERS: tuple[Grader, ...] = ("strict", "literature")
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


class Problem(NamedTuple):
    """One problem."""

    id: str
    question: str  # what a recipe's prompt takes as its instruction
    reference: str  # the bare final answer; of code, the program of the data set
    tests: dict[str, Any] | None = (
        None  # of code: what eval.sandbox.check needs, see eval.tasks.humaneval
    )
    plain: str = ""  # the data set's own text, where `question` says more than that


class Suite(NamedTuple):
    """One benchmark. Each is a value of eval.tasks.TASKS."""

    name: str
    kind: Literal["answer", "code"]  # code is run, in eval.sandbox.check
    rows: Callable[[Path | None, int | None], list[Problem]]
    literature_prompt: Callable[[str], str]  # the published prompt, whole, of a problem's question
    stops: tuple[
        str, ...
    ]  # the published strings that end a response; only with the published prompt
    max_new_tokens: int  # published
    grade: Callable[[str, Problem, Grader], bool] | None = None  # of answers
    to_program: Callable[[str, Problem, Grader], str] | None = None  # of code: what is run
