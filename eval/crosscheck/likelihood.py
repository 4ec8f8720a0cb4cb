"""The commonsense questions as lm-eval asks them: which choice is likeliest, not which label the model writes.

lm-eval's own prompts (0.4.13), filled from the rows that this repository reads: BoolQ's have no passage.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from eval.errors import EvalError
from eval.tasks.base import Problem


class View(NamedTuple):
    """How lm-eval asks one of the eight."""

    word: str  # before a choice's number, in LLM-Adapters' rows
    prompt: str
    metrics: tuple[str, ...]  # of lm-eval: acc, and acc_norm where it has that


_BOTH = ("acc", "acc_norm")
VIEWS = {
    "boolq": View("", "Question: {}?\nAnswer:", ("acc",)),
    "piqa": View("Solution", "Question: {}\nAnswer:", _BOTH),
    "siqa": View("Answer", "Q: {}\nA:", ("acc",)),
    "hellaswag": View("Ending", "{}", _BOTH),
    "winogrande": View("Option", "{}", ("acc",)),
    "arc_easy": View("Answer", "Question: {}\nAnswer:", _BOTH),
    "arc_challenge": View("Answer", "Question: {}\nAnswer:", _BOTH),
    "openbookqa": View("Answer", "{}", _BOTH),
}


def document(suite: str, problem: Problem) -> dict:
    """{query, choices, gold (index)} of a commonsense problem; of WinoGrande {choices (beginnings), suffix, gold}.

    Raises EvalError where the question does not list its choices.
    """
    view = VIEWS[suite]
    if suite == "boolq":
        query = view.prompt.format(
            problem.question.partition("question: ")[2].partition("\n\nAnswer format:")[0][:-1]
        )
        return {"query": query, "choices": ["no", "yes"], "gold": int(problem.reference == "true")}
    body, _, labels = problem.question.rpartition("Answer format:")
    head, *choices = (part.strip() for part in re.split(rf"\s*\b{view.word}\d: ?", body))
    stem, count, gold = (
        head.partition(": ")[2],
        labels.count("/") + 1,
        int(problem.reference[-1]) - 1,
    )
    if not stem or len(choices) != count or gold >= count:
        raise EvalError(
            f"{problem.id}: its question does not list {count} choices as {view.word}1: ...; leave it out"
        )
    if (
        suite == "winogrande"
    ):  # partial scoring: how likely is what follows the blank, after each option in it
        before, blank, suffix = stem.partition("_")
        if not blank:
            raise EvalError(f"{problem.id}: its sentence has no blank _; leave it out")
        return {
            "choices": [before + choice for choice in choices],
            "suffix": suffix.strip(),
            "gold": gold,
        }
    clean: Callable[[str], str] = _hellaswag if suite == "hellaswag" else str
    return {
        "query": view.prompt.format(clean(stem)),
        "choices": list(map(clean, choices)),
        "gold": gold,
    }


def _hellaswag(text: str) -> str:
    """lm-eval's: the brackets are left over from WikiHow."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
