"""The eight commonsense benchmarks of the LoRA literature, whose answers a model writes.

BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-Easy, ARC-Challenge and OpenBookQA. A row, as
LLM-Adapters publishes it: {"instruction": "Please choose ...", "input": "",
"output": "the correct answer is answer3", "answer": "answer3"}. The hub's own rows are put into the
same words. lm-eval compares the likelihoods of the choices instead; its numbers never share a table
with these.
"""

import re
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from eval.answers.labels import read_label
from eval.errors import EvalError
from eval.tasks.base import Benchmark, Grader, Problem
from eval.tasks.loading import Source, read_rows, read_text_field

FormatRow = Callable[[dict], tuple[str, str]]
"""Turns a row of the hub into an instruction and its answer."""
FILE_TYPES = ("jsonl", "json", "parquet")
CHOOSE = "Please choose the correct answer to the question: "


class Choices(NamedTuple):
    """One of the eight: the labels to choose from, and where its rows are."""

    labels: tuple[str, ...]
    num_problems: int  # official
    folder: str  # LLM-Adapters' name
    hub_id: str
    config: str | None
    split: str
    format_row: FormatRow


def _make_labels(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{i}" for i in range(1, count + 1))


def _list_options(word: str, options: list[str], separator: str = " ") -> str:
    """Return `Answer1: ... Answer2: ...` and the line that names the labels."""
    labels = _make_labels(word, len(options))
    listed = []
    for label, option in zip(labels, options, strict=True):
        listed.append(f"{label.capitalize()}: {option}")
    return f"{separator.join(listed)}\n\nAnswer format: {'/'.join(labels)}"


def _format_boolq(row: dict) -> tuple[str, str]:
    question = row["question"].rstrip("?")
    instruction = f"Please answer the following question with true or false, question: {question}?"
    return f"{instruction}\n\nAnswer format: true/false", str(bool(row["answer"])).lower()


def _format_piqa(row: dict) -> tuple[str, str]:
    options = _list_options("solution", [row["sol1"], row["sol2"]], "\n\n")
    question = f"Please choose the correct solution to the question: {row['goal']}"
    return f"{question}\n\n{options}", f"solution{int(row['label']) + 1}"


def _format_siqa(row: dict) -> tuple[str, str]:
    options = _list_options("answer", [row["answerA"], row["answerB"], row["answerC"]])
    question = f"{CHOOSE}{row['context']} {row['question']}"
    return f"{question}\n\n{options}", f"answer{int(row['label'])}"


def _format_hellaswag(row: dict) -> tuple[str, str]:
    context = f"{row['activity_label']}: {row['ctx']}"
    question = f"Please choose the correct ending to complete the given sentence: {context}"
    options = _list_options("ending", row["endings"])
    return f"{question}\n\n{options}", f"ending{int(row['label']) + 1}"


def _format_winogrande(row: dict) -> tuple[str, str]:
    question = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{row['sentence']}"
    )
    options = f"Option1: {row['option1']} Option2: {row['option2']} Answer format: option1/option2"
    return f"{question}\n\n{options}", f"option{int(row['answer'])}"


def _format_question(row: dict) -> tuple[str, str]:
    """Turn a row of ARC or OpenBookQA into an instruction and its answer."""
    question = row.get("question") or row["question_stem"]
    choices = row["choices"]
    number = choices["label"].index(row["answerKey"]) + 1
    options = _list_options("answer", choices["text"])
    return f"{CHOOSE}{question}\n\n{options}", f"answer{number}"


CHOICES = {
    "boolq": Choices(
        ("true", "false"), 3270, "boolq", "google/boolq", None, "validation", _format_boolq
    ),
    "piqa": Choices(
        _make_labels("solution", 2), 1838, "piqa", "baber/piqa", None, "validation", _format_piqa
    ),
    "siqa": Choices(
        _make_labels("answer", 3),
        1954,
        "social_i_qa",
        "lighteval/siqa",
        None,
        "validation",
        _format_siqa,
    ),
    "hellaswag": Choices(
        _make_labels("ending", 4),
        10042,
        "hellaswag",
        "Rowan/hellaswag",
        None,
        "validation",
        _format_hellaswag,
    ),
    "winogrande": Choices(
        _make_labels("option", 2),
        1267,
        "winogrande",
        "allenai/winogrande",
        "winogrande_xl",
        "validation",
        _format_winogrande,
    ),
    # Five labels, because one ARC-Easy question has five choices.
    "arc_easy": Choices(
        _make_labels("answer", 5),
        2376,
        "ARC-Easy",
        "allenai/ai2_arc",
        "ARC-Easy",
        "test",
        _format_question,
    ),
    "arc_challenge": Choices(
        _make_labels("answer", 5),
        1172,
        "ARC-Challenge",
        "allenai/ai2_arc",
        "ARC-Challenge",
        "test",
        _format_question,
    ),
    "openbookqa": Choices(
        _make_labels("answer", 4),
        500,
        "openbookqa",
        "allenai/openbookqa",
        "main",
        "test",
        _format_question,
    ),
}


def make_source(name: str) -> Source:
    """Return where the rows of one of `CHOICES` are."""
    choices = CHOICES[name]
    files = []
    for parent in ("commonsense_test/", ""):
        for folder in dict.fromkeys((choices.folder, name)):
            files += [f"{parent}{folder}/test.{file_type}" for file_type in FILE_TYPES]
    return Source(name, tuple(files), choices.hub_id, choices.config, choices.split)


def read_problems(name: str, data_dir: Path | None, limit: int | None = None) -> list[Problem]:
    """Read the first `limit` problems of one of `CHOICES`; see eval.tasks.loading.read_rows.

    Raises:
        EvalError: a row has neither LLM-Adapters' form nor the hub's, or its answer is not a label.
    """
    source, labels = make_source(name), CHOICES[name].labels
    problems = []
    for number, row in enumerate(islice(read_rows(source, data_dir), limit), start=1):
        if "instruction" in row:
            instruction = read_text_field(row, "instruction", source, number)
            reference = read_text_field(row, "answer", source, number)
        else:
            try:
                instruction, reference = CHOICES[name].format_row(row)
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise EvalError(
                    f"{name}: row {number} has neither LLM-Adapters' fields nor the hub's "
                    f"({reason})"
                ) from None
        if reference not in labels:
            raise EvalError(f"{name}: row {number}: {reference!r} is none of {', '.join(labels)}")
        problems.append(Problem(f"{name}/{number - 1}", instruction, reference))
    return problems


def grade_label(output: str, reference: str, name: str, grader: Grader = "strict") -> bool:
    """Return whether `output` gives the label `reference` of one of `CHOICES`. Never raises.

    strict: the one label that eval.answers.labels reads; the rule is in docs/graders.md. Several
    labels, a denied one and an echo of the answer format are no answer.

    literature: LLM-Adapters' rule takes the first label anywhere, in lower case, also inside a
    word. So "untrue" is true, and answer11 is answer1. Of SIQA, ARC and OpenBookQA alike it knows
    answer1 to answer5.
    """
    return _find_label(output, name, grader) == reference


def _find_label(output: str, name: str, grader: Grader) -> str | None:
    labels = CHOICES[name].labels  # also those that this question does not offer
    if grader == "strict":
        return read_label(output, labels)
    published = _make_labels("answer", 5) if labels[0] == "answer1" else labels
    match = re.search("|".join(published), output)
    return match.group() if match else None


# LLM-Adapters' evaluation prompt: a space after "request.", and the indentation of its source file.
_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request. \n\n"
    "                ### Instruction:\n                {question}\n\n"
    "                ### Response:\n                "
)


def _make_benchmark(name: str) -> Benchmark:
    return Benchmark(
        name=name,
        kind="answer",
        num_problems=CHOICES[name].num_problems,
        read_problems=partial(read_problems, name),
        format_literature_prompt=lambda question: _PROMPT.format(question=question),
        stops=(),
        max_new_tokens=32,
        grade=lambda output, problem, grader: grade_label(output, problem.reference, name, grader),
        finds_answer=lambda output, grader: _find_label(output, name, grader) is not None,
        group="commonsense",
    )


BENCHMARKS = tuple(_make_benchmark(name) for name in CHOICES)
