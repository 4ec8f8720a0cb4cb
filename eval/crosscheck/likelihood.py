"""The commonsense questions as lm-eval asks them: by the likelihood of each choice.

The model writes nothing. The prompts are those of lm-eval 0.4.13, filled from the rows that this
repository reads. BoolQ's rows have no passage.
"""

import re
from typing import NamedTuple

from eval.errors import EvalError
from eval.tasks.base import Problem


class View(NamedTuple):
    """How lm-eval asks one of the eight benchmarks."""

    word: str  # before a choice's number, in LLM-Adapters' rows
    prompt: str
    metrics: tuple[str, ...]  # of lm-eval


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


def make_document(benchmark: str, problem: Problem) -> dict:
    """Return the document of a commonsense problem for lm-eval.

    Returns:
        {query, choices, gold (index)}; for WinoGrande {choices (beginnings), suffix, gold}.

    Raises:
        EvalError: the question does not list its choices.
    """
    view = VIEWS[benchmark]
    if benchmark == "boolq":
        asked = problem.question.partition("question: ")[2].partition("\n\nAnswer format:")[0]
        query = view.prompt.format(asked[:-1])  # the prompt has its own question mark
        return {"query": query, "choices": ["no", "yes"], "gold": int(problem.reference == "true")}
    question, choices = _split_choices(problem, view.word)
    gold = int(problem.reference[-1]) - 1
    if benchmark == "winogrande":
        return _make_winogrande_document(problem, question, choices, gold)
    if benchmark == "hellaswag":
        question = _clean_hellaswag(question)
        choices = [_clean_hellaswag(choice) for choice in choices]
    return {"query": view.prompt.format(question), "choices": choices, "gold": gold}


def _split_choices(problem: Problem, word: str) -> tuple[str, list[str]]:
    """Return the question proper, and the texts of its choices."""
    body, _, labels = problem.question.rpartition("Answer format:")
    parts = [part.strip() for part in re.split(rf"\s*\b{word}\d: ?", body)]
    question, choices = parts[0].partition(": ")[2], parts[1:]
    count = labels.count("/") + 1
    if not question or len(choices) != count or int(problem.reference[-1]) > count:
        raise EvalError(
            f"{problem.id}: its question does not list {count} choices as {word}1: ...; "
            "leave it out"
        )
    return question, choices


def _make_winogrande_document(
    problem: Problem, sentence: str, choices: list[str], gold: int
) -> dict:
    """Return a document that asks how likely the end of the sentence is after each option."""
    before, blank, suffix = sentence.partition("_")
    if not blank:
        raise EvalError(f"{problem.id}: its sentence has no blank _; leave it out")
    beginnings = [before + choice for choice in choices]
    return {"choices": beginnings, "suffix": suffix.strip(), "gold": gold}


def _clean_hellaswag(text: str) -> str:
    """Drop the brackets that are left over from WikiHow, as lm-eval does."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
