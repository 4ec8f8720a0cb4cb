"""The eight commonsense suites of the LoRA literature, generated: BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC, OBQA.

A row, as LLM-Adapters publishes it: {"instruction": "Please choose ...", "input": "", "output": "the correct answer is
answer3", "answer": "answer3"}. The hub's own rows are put into the same words. This is not the likelihood view of
lm-eval, whose numbers never share a table with these.
"""

import re
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from eval.errors import EvalError
from eval.tasks.base import Grader, Problem, Suite
from eval.tasks.loading import Source, read, text

Raw = Callable[[dict], tuple[str, str]]  # a row of the hub -> instruction, answer
KINDS = ("jsonl", "json", "parquet")
CHOOSE = "Please choose the correct answer to the question: "


class Task(NamedTuple):
    """One of the eight."""

    labels: tuple[str, ...]
    folder: str  # LLM-Adapters' name
    hub: tuple[str, str | None, str]  # id, config, split
    raw: Raw


def _numbered(word: str, options: list[str], between: str = " ") -> str:
    """`Answer1: ... Answer2: ...` and the line that names the labels."""
    listed = between.join(
        f"{word.capitalize()}{i}: {option}" for i, option in enumerate(options, start=1)
    )
    return f"{listed}\n\nAnswer format: {_format(word, len(options))}"


def _format(word: str, count: int) -> str:
    return "/".join(f"{word}{i}" for i in range(1, count + 1))


def _boolq(row: dict) -> tuple[str, str]:
    question = row["question"].rstrip("?")
    instruction = f"Please answer the following question with true or false, question: {question}?"
    return f"{instruction}\n\nAnswer format: true/false", str(bool(row["answer"])).lower()


def _piqa(row: dict) -> tuple[str, str]:
    options = _numbered("solution", [row["sol1"], row["sol2"]], "\n\n")
    question = f"Please choose the correct solution to the question: {row['goal']}"
    return f"{question}\n\n{options}", f"solution{int(row['label']) + 1}"


def _siqa(row: dict) -> tuple[str, str]:
    options = _numbered("answer", [row["answerA"], row["answerB"], row["answerC"]])
    return f"{CHOOSE}{row['context']} {row['question']}\n\n{options}", f"answer{int(row['label'])}"


def _hellaswag(row: dict) -> tuple[str, str]:
    context = f"{row['activity_label']}: {row['ctx']}"
    question = f"Please choose the correct ending to complete the given sentence: {context}"
    return f"{question}\n\n{_numbered('ending', row['endings'])}", f"ending{int(row['label']) + 1}"


def _winogrande(row: dict) -> tuple[str, str]:
    question = f"Please choose the correct answer to fill in the blank to complete the given sentence: {row['sentence']}"
    options = f"Option1: {row['option1']} Option2: {row['option2']} Answer format: option1/option2"
    return f"{question}\n\n{options}", f"option{int(row['answer'])}"


def _choices(row: dict) -> tuple[str, str]:
    """ARC and OpenBookQA."""
    question, choices = row.get("question") or row["question_stem"], row["choices"]
    number = choices["label"].index(row["answerKey"]) + 1
    return f"{CHOOSE}{question}\n\n{_numbered('answer', choices['text'])}", f"answer{number}"


def _labels(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{i}" for i in range(1, count + 1))


TASKS = {
    "boolq": Task(("true", "false"), "boolq", ("google/boolq", None, "validation"), _boolq),
    "piqa": Task(_labels("solution", 2), "piqa", ("baber/piqa", None, "validation"), _piqa),
    "siqa": Task(
        _labels("answer", 3), "social_i_qa", ("lighteval/siqa", None, "validation"), _siqa
    ),
    "hellaswag": Task(
        _labels("ending", 4), "hellaswag", ("Rowan/hellaswag", None, "validation"), _hellaswag
    ),
    "winogrande": Task(
        _labels("option", 2),
        "winogrande",
        ("allenai/winogrande", "winogrande_xl", "validation"),
        _winogrande,
    ),
    # One ARC-Easy question has five choices.
    "arc_easy": Task(
        _labels("answer", 5), "ARC-Easy", ("allenai/ai2_arc", "ARC-Easy", "test"), _choices
    ),
    "arc_challenge": Task(
        _labels("answer", 5),
        "ARC-Challenge",
        ("allenai/ai2_arc", "ARC-Challenge", "test"),
        _choices,
    ),
    "openbookqa": Task(
        _labels("answer", 4), "openbookqa", ("allenai/openbookqa", "main", "test"), _choices
    ),
}


def source(task: str) -> Source:
    folder, (hub_id, config, split) = TASKS[task].folder, TASKS[task].hub
    names = dict.fromkeys((folder, task))
    files = [
        f"{place}{name}/test.{kind}"
        for place in ("commonsense_test/", "")
        for name in names
        for kind in KINDS
    ]
    return Source(task, tuple(files), hub_id, config, split)


def rows(task: str, data_dir: Path | None, limit: int | None = None) -> list[Problem]:
    """The first `limit` problems of one of TASKS. Raises EvalError for a row that is neither form."""
    where, labels = source(task), TASKS[task].labels
    problems = []
    for number, row in enumerate(islice(read(where, data_dir), limit), start=1):
        if "instruction" in row:
            instruction, reference = (
                text(row, "instruction", where, number),
                text(row, "answer", where, number),
            )
        else:
            try:
                instruction, reference = TASKS[task].raw(row)
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise EvalError(
                    f"{task}: row {number} has neither LLM-Adapters' fields nor the hub's ({reason})"
                ) from None
        if reference not in labels:
            raise EvalError(f"{task}: row {number}: {reference!r} is none of {', '.join(labels)}")
        problems.append(Problem(f"{task}/{number - 1}", instruction, reference))
    return problems


def grade(output: str, reference: str, task: str, protocol: Grader = "strict") -> bool:
    """Whether `output` gives the label `reference`. Never raises.

    strict: of the text up to the next "###", the label that follows the last "answer is", else the only label that is
    named at all; case and a space before the number do not matter, and a label is a whole word.

    literature: LLM-Adapters' rule: the first label anywhere, in lower case, as part of a word too, so that "untrue" is
    true and answer11 is answer1.
    """
    labels = TASKS[task].labels
    if protocol == "literature":
        match = re.search("|".join(labels), output)
        return match is not None and match.group() == reference
    response = output.partition("###")[0]
    words = [
        re.sub(r"(?=\\d|\d)", r"\\s?", label, count=1) if label[-1].isdigit() else label
        for label in labels
    ]
    pattern = re.compile(rf"\b(?:{'|'.join(words)})\b", re.IGNORECASE)
    for stated in reversed(list(re.finditer(r"\banswer is\b", response, re.IGNORECASE))):
        named = pattern.search(response, stated.end())
        if named:
            return _label(named.group()) == reference
        if response[stated.end() :].strip():
            return False
    named = {_label(found) for found in pattern.findall(response)}
    return named == {reference}


def _label(found: str) -> str:
    return re.sub(r"\s", "", found).lower()


# LLM-Adapters' evaluation prompt: a space after "request.", and the indentation of its source file.
_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
    "                ### Instruction:\n                {question}\n\n                ### Response:\n                "
)


def _suite(task: str) -> Suite:
    return Suite(
        name=task,
        kind="answer",
        rows=partial(rows, task),
        literature_prompt=lambda question: _PROMPT.format(question=question),
        stops=(),
        max_new_tokens=32,
        grade=lambda output, problem, protocol: grade(output, problem.reference, task, protocol),
    )


SUITES = [_suite(task) for task in TASKS]
