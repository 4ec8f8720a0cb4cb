"""Contamination: training rows that share a question, or 13 words in a row, with a benchmark.

Words are compared in lower case, without punctuation. A row's instruction with its input is
compared with a benchmark's questions; that and its answer with the 13-grams of the questions and of
the programs that are references. Two kinds of 13-grams do not count: those with a word of the
benchmark's template, which is every 5-gram that a tenth of its problems share ("answer format
answer1 answer2 answer3"), and phrases, which more than 3 problems share. Of code, the task's own
text, without what the prompt puts around it, is a question too, and all its 13-grams count. A
rewording is not found.
"""

import contextlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from eval.tasks import BENCHMARKS, expand_groups
from eval.tasks.base import Problem
from launch.config.schema import Data, Recipe
from launch.data.chat.messages import MessagesError, read_messages
from launch.data.layout import Split
from launch.data.rows import Conversation, Row, fetch_source, load_split, select_rows, show_rows

GRAM = 13  # words; as GPT-3's authors took (Brown et al. 2020, appendix C)
MAX_SHARED = 3  # problems that may share a 13-gram; one that more share is a phrase
TEMPLATE_GRAM = 5  # words
TEMPLATE_SHARE = 0.1  # of the problems, which share a 5-gram of the template
MAX_EXAMPLES = 5  # rows that are named, of each benchmark


class BenchmarkIndex(NamedTuple):
    """The questions and 13-grams of a benchmark, each with the indices of its problems."""

    problems: list[Problem]
    questions: dict[str, set[int]]
    grams: dict[str, set[int]]
    phrases: int  # 13-grams that do not count because many problems share them


@dataclass
class _Tally:
    """What the rows read so far share with one benchmark."""

    rows: Counter[str] = field(default_factory=Counter)  # "question" or "13-gram" -> rows
    problems: set[int] = field(default_factory=set)
    examples: list[dict] = field(default_factory=list)


def find_overlaps(recipe: Recipe, benchmarks: Sequence[str]) -> dict[str, dict]:
    """Compare the rows that a recipe selects with benchmarks. Shows the progress.

    Rows are streamed: memory grows with the benchmarks alone. Of a mix all rows of each source are
    compared, also those that the mix does not take.

    Args:
        benchmarks: names of benchmarks and of groups.

    Returns:
        Name of the benchmark -> question (rows that share one), 13-gram (rows that share one, but
        no question), problems (that share something with a row), examples (of rows), rows (in
        all), of (problems in all) and phrases (see BenchmarkIndex).

    Raises:
        UserError: the rows cannot be read.
        EvalError: a benchmark cannot be read.
    """
    data_dir = None if recipe.eval.data_dir is None else Path(recipe.eval.data_dir).expanduser()
    indices = {}
    for name in expand_groups(list(benchmarks)):
        indices[name] = index_benchmark(BENCHMARKS[name].read_problems(data_dir, None))
    tallies = {name: _Tally() for name in indices}
    num_rows = 0
    for name, data in (recipe.data.list_sources() or {None: recipe.data}).items():
        for row in _stream_rows(load_split(data, fetch_source(data)), data):
            num_rows += 1
            _tally_row(row, name, indices, tallies)
    overlaps = {}
    for name, tally in tallies.items():
        overlaps[name] = {
            "question": tally.rows["question"],
            "13-gram": tally.rows["13-gram"],
            "problems": len(tally.problems),
            "examples": tally.examples,
            "rows": num_rows,
            "of": len(indices[name].problems),
            "phrases": indices[name].phrases,
        }
    return overlaps


def _stream_rows(split: Split, data: Data) -> Iterator[Row]:
    """Yield the good rows that `data` selects, while their progress is shown."""
    with show_rows(split, data, "overlap") as advance:
        for chunk in select_rows(split, data):
            for row in chunk.rows:
                if isinstance(row, Row):
                    yield row
                    continue
                with contextlib.suppress(MessagesError):  # such a row is not trained on
                    yield _join_messages(row, data)
            advance(chunk)


def _join_messages(row: Conversation, data: Data) -> Row:
    """Return a conversation as a row: the user's first message, and all the others as the answer."""
    messages, _ = read_messages(row.messages, data.messages, data.train_on)
    texts = [message["content"] for message in messages]
    roles = [message["role"] for message in messages]
    question = texts.pop(roles.index("user")) if "user" in roles else ""
    return Row(row.number, question, input="", answer="\n".join(texts))


def _tally_row(
    row: Row,
    source: str | None,
    indices: Mapping[str, BenchmarkIndex],
    tallies: Mapping[str, _Tally],
) -> None:
    """Add to the tallies what a row shares with each benchmark.

    Args:
        source: of a mix that the row is of; None without a mix.
    """
    question = normalise_text(f"{row.instruction} {row.input}")
    texts = (question, normalise_text(row.answer))
    for name, index in indices.items():
        same = index.questions.get(question, set())
        shared = {}
        for text in texts:
            for gram in split_grams(text):
                if gram in index.grams:
                    shared[gram] = index.grams[gram]
        problems = same.union(*shared.values())
        if not problems:
            continue
        kind, text = ("question", question) if same else ("13-gram", next(iter(shared)))
        tally = tallies[name]
        tally.rows[kind] += 1
        tally.problems |= problems
        if len(tally.examples) < MAX_EXAMPLES:
            first = index.problems[min(same or shared[text])]
            where = {} if source is None else {"source": source}
            where["row"] = row.number
            tally.examples.append(where | {"problem": first.id, "shares": kind, "text": text[:200]})


def index_benchmark(problems: list[Problem]) -> BenchmarkIndex:
    """Index the questions of `problems`, and the 13-grams that are neither template nor phrases."""
    questions: dict[str, set[int]] = {}
    grams: dict[str, set[int]] = {}
    texts = []  # of each problem: question, the task's own text, reference
    for problem in problems:
        parts = (problem.question, problem.plain, problem.reference)
        texts.append(tuple(map(normalise_text, parts)))
    template = _find_template(texts)
    for number, parts in enumerate(texts):
        question, own_text, _ = parts
        for text in (question, own_text):
            if text:
                questions.setdefault(text, set()).add(number)
        stretches = [own_text]
        for text in parts:
            stretches += _remove_template(text, template)
        for stretch in stretches:
            for gram in split_grams(stretch):
                grams.setdefault(gram, set()).add(number)
    counted = {gram: numbers for gram, numbers in grams.items() if len(numbers) <= MAX_SHARED}
    return BenchmarkIndex(problems, questions, counted, len(grams) - len(counted))


def _find_template(texts: Sequence[tuple[str, ...]]) -> set[str]:
    """Find the 5-grams that a tenth of the problems share, and more than share a 13-gram."""
    counts: Counter[str] = Counter()
    for parts in texts:
        of_problem: set[str] = set()
        for text in parts:
            of_problem.update(split_grams(text, TEMPLATE_GRAM))
        counts.update(of_problem)
    least = max(MAX_SHARED, TEMPLATE_SHARE * len(texts))
    return {gram for gram, count in counts.items() if count > least}


def _remove_template(text: str, template: set[str]) -> list[str]:
    """Return the stretches of a normalised text between its words that belong to the template."""
    words = text.split(" ")
    is_own = [True] * len(words)
    for start, gram in enumerate(split_grams(text, TEMPLATE_GRAM)):
        if gram in template:
            is_own[start : start + TEMPLATE_GRAM] = [False] * TEMPLATE_GRAM
    stretches = []
    for own, group in groupby(zip(words, is_own, strict=True), key=lambda pair: pair[1]):
        if own:
            stretches.append(" ".join(word for word, _ in group))
    return stretches


def normalise_text(text: str) -> str:
    """Return the words of a text in lower case, with one space between.

    A word is a run of letters, digits and underscores in Unicode's compatibility form (NFKC).
    """
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower()))


def split_grams(text: str, size: int = GRAM) -> Iterator[str]:
    """Yield every run of `size` words of a normalised text."""
    starts = [0, *(match.end() for match in re.finditer(" ", text)), len(text) + 1]
    for i in range(len(starts) - size):
        yield text[starts[i] : starts[i + size] - 1]
