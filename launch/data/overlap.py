"""Contamination: training rows that share a question, or 13 words in a row, with an evaluation suite.

Words are compared in lower case without punctuation. Of a suite, 13-grams of the questions and of the programs that are
their references are looked for, but not its template: none has a word of a 5-gram that a tenth of the problems share
("answer format answer1 answer2 answer3"), and none is a phrase that more than 3 problems share. Of code, the task's own
text, without what the prompt puts around it, is a question too, and all its 13-grams count. Of a training row, its
instruction with its input is compared with the questions, and that and its answer with the 13-grams. A rewording is not
found.
"""

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from eval.tasks import TASKS, expand
from eval.tasks.base import Problem
from launch.config.schema import Recipe
from launch.data import sources as rows

GRAM = 13  # words; as GPT-3's authors took (Brown et al. 2020, appendix C)
PHRASE = 3  # problems that may share a 13-gram before it counts as a phrase of the suite's
TEMPLATE_GRAM, TEMPLATE_SHARE = (
    5,
    0.1,
)  # words, and share of the problems that have them, of a suite's template
EXAMPLES = 5  # rows of each suite that are named


class Suite(NamedTuple):
    """What of a suite is looked for, and the indices of the problems that have it."""

    problems: list[Problem]
    questions: dict[str, set[int]]
    grams: dict[str, set[int]]
    phrases: int  # 13-grams left out because many problems share them


def check(recipe: Recipe, suites: list[str]) -> dict[str, dict]:
    """Suite -> how many rows that `recipe` selects share something with it, with how many problems, and examples.

    Memory grows with the suites, not with the rows, which are streamed. Shows a progress bar.

    Raises:
        UserError, EvalError: the rows or a suite cannot be read.
    """
    data_dir = None if recipe.eval.data_dir is None else Path(recipe.eval.data_dir).expanduser()
    index = {name: index_suite(TASKS[name].rows(data_dir, None)) for name in expand(suites)}
    dataset = rows.load(recipe.data, rows.fetch(recipe.data))
    found = {
        name: {"question": 0, "13-gram": 0, "problems": set(), "examples": []} for name in index
    }
    num_rows = 0
    for row in _stream(dataset, recipe):
        num_rows += 1
        prompt = normalise(f"{row.instruction} {row.input}")
        texts = (prompt, normalise(row.answer))
        for name, suite in index.items():
            same = suite.questions.get(prompt, set())
            shared = {
                gram: suite.grams[gram]
                for text in texts
                for gram in grams(text)
                if gram in suite.grams
            }
            met = same.union(*shared.values())
            if not met:
                continue
            how, text = ("question", prompt) if same else ("13-gram", next(iter(shared)))
            found[name][how] += 1
            found[name]["problems"] |= met
            if len(found[name]["examples"]) < EXAMPLES:
                problem = suite.problems[min(same or shared[text])].id
                found[name]["examples"].append(
                    {"row": row.number, "problem": problem, "shares": how, "text": text[:200]}
                )
    return {
        name: of
        | {"rows": num_rows, "problems": len(of["problems"]), "of": len(index[name].problems)}
        | {"phrases": index[name].phrases}
        for name, of in found.items()
    }


def _stream(dataset, recipe: Recipe) -> Iterator[rows.Row]:  # noqa: ANN001 (datasets is imported late)
    total = min(len(dataset), recipe.data.limit or len(dataset))
    with tqdm(total=total, desc="overlap", unit=" rows", disable=not sys.stderr.isatty()) as bar:
        for chunk in rows.select(dataset, recipe.data):
            yield from chunk.rows
            bar.update((chunk.position if recipe.data.limit is None else chunk.selected) - bar.n)


def index_suite(problems: list[Problem]) -> Suite:
    """The questions and 13-grams of `problems`, without their template's."""
    texts = [tuple(map(normalise, (of.question, of.plain, of.reference))) for of in problems]
    template = _template(texts)
    questions: dict[str, set[int]] = {}
    of_gram: dict[str, set[int]] = {}
    for i, of_problem in enumerate(texts):
        for question in filter(None, of_problem[:2]):
            questions.setdefault(question, set()).add(i)
        stretches = [
            of_problem[1],
            *(own for text in of_problem for own in _without(text, template)),
        ]
        for gram in (gram for stretch in stretches for gram in grams(stretch)):
            of_gram.setdefault(gram, set()).add(i)
    kept = {gram: having for gram, having in of_gram.items() if len(having) <= PHRASE}
    return Suite(problems, questions, kept, len(of_gram) - len(kept))


def _template(texts: list[tuple[str, ...]]) -> set[str]:
    """The 5-grams that a tenth of a suite's problems share, and more than a phrase's few."""
    counts = Counter(
        gram
        for of_problem in texts
        for gram in {gram for text in of_problem for gram in grams(text, TEMPLATE_GRAM)}
    )
    return {
        gram for gram, count in counts.items() if count > max(PHRASE, TEMPLATE_SHARE * len(texts))
    }


def _without(text: str, template: set[str]) -> list[str]:
    """The stretches of a normalised text between its words that belong to `template`."""
    words = text.split(" ")
    own = [True] * len(words)
    for i, gram in enumerate(grams(text, TEMPLATE_GRAM)):
        if gram in template:
            own[i : i + TEMPLATE_GRAM] = [False] * TEMPLATE_GRAM
    groups = groupby(zip(words, own, strict=True), key=lambda pair: pair[1])
    return [" ".join(word for word, _ in group) for is_own, group in groups if is_own]


def normalise(text: str) -> str:
    """Words in lower case with one space between: letters, digits and underscores in compatibility form."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower()))


def grams(text: str, size: int = GRAM) -> Iterator[str]:
    """Each stretch of `size` words of a normalised text."""
    starts = [0, *(match.end() for match in re.finditer(" ", text)), len(text) + 1]
    for i in range(len(starts) - size):
        yield text[starts[i] : starts[i + size] - 1]
