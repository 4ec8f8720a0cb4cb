"""Rows with one text or a pair, with a label or, to calibrate on, without."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from launch.config.schema import Data
from launch.config.task import Task
from launch.data.rows import (
    EMPTY,
    BadRow,
    RowForm,
    find_text_fault,
    make_bad_row,
    show_value,
)

NO_LABEL, NO_NUMBER = "label not in task.labels", "label no number"
# Data sets may count their labels from 1: all but the last then pass for the label after them.
ONE_BEYOND = "label one beyond the places in task.labels"


class TaskRow(NamedTuple):
    """A row that can be trained on, scored or calibrated on."""

    number: int  # in the split, from 1
    texts: tuple[str, ...]  # one, or a pair
    label: float | None  # place in task.labels, or a number; None to calibrate on


def make_task_form(task: Task, data: Data) -> RowForm:
    """Make the form of rows with one text or two and a label; good rows are a TaskRow."""
    columns = {
        "task.sentence1": [task.sentence1],
        "task.sentence2": [task.sentence2] if task.sentence2 else [],
        "task.label": [task.label],
        "data.filter": list(data.filter),
    }
    return RowForm(columns, lambda number, row: _check_row(number, row, task))


def make_unlabelled_form(data: Data, sentence1: str, sentence2: str | None) -> RowForm:
    """Make the form of rows with one text or two; good rows are a TaskRow without a label."""
    columns = {
        "data.sentence1": [sentence1],
        "data.sentence2": [sentence2] if sentence2 else [],
        "data.filter": list(data.filter),
    }

    def check(number: int, row: dict[str, Any]) -> TaskRow | BadRow:
        texts = _check_texts(number, row, sentence1, sentence2)
        return texts if isinstance(texts, BadRow) else TaskRow(number, texts, label=None)

    return RowForm(columns, check)


def _check_texts(
    number: int, row: dict[str, Any], sentence1: str, sentence2: str | None
) -> tuple[str, ...] | BadRow:
    """Return a row's texts, or what is wrong with them."""
    fields = [sentence1] + ([sentence2] if sentence2 else [])
    texts = []
    for field in fields:
        value = row.get(field)
        fault = find_text_fault(value)
        if fault is not None:
            return make_bad_row(number, field, value, fault)
        texts.append(value)
    if not any(text.strip() for text in texts):  # GLUE's QQP has pairs with one empty text
        return make_bad_row(number, fields[0], texts[0], EMPTY)
    return tuple(texts)


def _check_row(number: int, row: dict[str, Any], task: Task) -> TaskRow | BadRow:
    """Return a row's texts and label, or what is wrong with it."""
    texts = _check_texts(number, row, task.sentence1, task.sentence2)
    if isinstance(texts, BadRow):
        return texts
    value = row.get(task.label)
    label = _read_number(value) if task.kind == "regression" else _find_label(value, task.labels)
    if label is None:
        reason, wanted = _explain_label(value, task.labels)
        what = f"field {task.label!r} is {show_value(value)}, which is not {wanted}"
        return BadRow(number, reason, what)
    return TaskRow(number, texts, label)


def _explain_label(value: object, labels: Sequence[str]) -> tuple[str, str]:
    """Return the reason for which a label is bad, and what it would have to be."""
    if not labels:
        return NO_NUMBER, "a finite number"
    wanted = f"one of task.labels, {', '.join(labels)}"
    if _have_numbers(labels):
        return NO_LABEL, wanted
    wanted += f", nor a place from 0 to {len(labels) - 1}"
    if _read_number(value) == len(labels):
        return ONE_BEYOND, f"{wanted} (do the rows count from 1?)"
    return NO_LABEL, wanted


def _have_numbers(labels: Sequence[str]) -> bool:
    """Return whether one of the labels is a number, so that numbers are no places."""
    return any(_read_number(label) is not None for label in labels)


def _read_number(value: object) -> float | None:
    """Return a finite number, that of a text too; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _find_label(value: object, labels: Sequence[str]) -> float | None:
    """Return the place of a label: of its text or, where no label is a number, its place.

    A number is the label with that value, `2` that of `2.0`. Data sets of the hub hold places.
    """
    if value in labels:
        return float(labels.index(value))
    number = _read_number(value)
    if number is None:
        return None
    if _have_numbers(labels):
        numbers = [_read_number(label) for label in labels]
        return float(numbers.index(number)) if number in numbers else None
    return number if number == int(number) and 0 <= number < len(labels) else None
