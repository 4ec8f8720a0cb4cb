"""What a recipe's task decides: fields that GLUE fixes, and settings that the recipe has by task."""

import copy
import difflib
from typing import Any

from eval.glue import GLUE
from launch.config.overrides import set_field
from launch.runtime.errors import UserError

BY_TASK = "by_task"  # in a recipe's file: {task.name: {field: value}}


def apply_task_settings(values: dict, overrides: list[tuple[str, Any]]) -> None:
    """Take `by_task` out of nested `values`, and set in them what it has for their task.

    Args:
        values: of a recipe's file.
        overrides: (field, value) that will be set after this; `task.name` may be among them.

    Raises:
        UserError: `by_task` is not {task.name: {field: value}}, or lacks the task.
    """
    by_task = values.pop(BY_TASK, None)
    if by_task is None:
        return
    if not _has_names(by_task) or not all(map(_has_names, by_task.values())):
        raise UserError(f"{BY_TASK}: is not of the form {{task.name: {{field: value}}}}")
    overridden = copy.deepcopy(values)
    for field, value in overrides:
        set_field(overridden, field, value)
    name = _get_task_name(overridden)
    if name not in by_task:
        raise UserError(
            f"task.name: the recipe has settings for {', '.join(by_task)}, not for {name}; set it "
            "to one of those, or take another recipe"
        )
    for field, value in by_task[name].items():
        if isinstance(value, dict) and "." not in field:
            raise UserError(
                f"{BY_TASK}: {name}: {field} is a section; write its fields one by one, such as "
                f"{field}.{next(iter(value), 'name')}: ..."
            )
        set_field(values, field, value)


def merge_task_settings(base: dict, values: dict) -> dict:
    """Return `by_task` of a recipe's `values` with what the extended `base` has for the same tasks.

    Empty where one of them has none. What is not of the right form is left for
    `apply_task_settings` to refuse.
    """
    first, second = base.get(BY_TASK), values.get(BY_TASK)
    if not (_has_names(first) and _has_names(second)):
        return {}
    merged = first | second
    for name, settings in first.items():
        if _has_names(settings) and _has_names(second.get(name)):
            merged[name] = settings | second[name]
    return {BY_TASK: merged}


def drop_set_fields(base: dict, values: dict) -> None:
    """Take out of `by_task` of an extended recipe `base` what the extending `values` set themselves.

    What is not of the right form is left for `apply_task_settings` to refuse.
    """
    by_task = base.get(BY_TASK)
    if not _has_names(by_task):
        return
    for name, settings in by_task.items():
        if _has_names(settings):
            by_task[name] = {
                field: value for field, value in settings.items() if not _is_set(values, field)
            }


def _is_set(values: dict, field: str) -> bool:
    """Return whether `a.b` is in nested `values`."""
    for part in field.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def fill_glue_fields(values: dict) -> None:
    """Set the fields that task.name decides in nested `values`, if it is one of GLUE's.

    Fields that are set, to null too, are left: rows may come from elsewhere.

    Raises:
        UserError: the name is not one of GLUE's, and nothing says what kind of task it is; or it is,
            and kind or order of labels are others, for which GLUE's metrics are wrong.
    """
    name = _get_task_name(values)
    if name is None:
        return
    task = values["task"]
    if name not in GLUE:
        if "kind" not in task:
            near = difflib.get_close_matches(name.lower(), GLUE, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"task.name: no task {name!r} of GLUE; {hint}there are: {', '.join(GLUE)}; for a "
                "task of your own set task.kind"
            )
        return
    facts = GLUE[name]
    labels = task.get("labels")
    is_reordered = isinstance(labels, list) and labels != list(facts.labels)
    if task.get("kind", facts.kind) != facts.kind:
        raise UserError(
            f"task.kind: GLUE's {name} is a {facts.kind}; give a task of your own another name"
        )
    if is_reordered and sorted(map(str, labels)) == sorted(facts.labels):
        raise UserError(
            f"task.labels: GLUE's {name} has them in the order {', '.join(facts.labels)}, which its "
            "numbers and metrics follow; leave the field out, or give a task of your own another name"
        )
    decided = {
        "kind": facts.kind,
        "labels": list(facts.labels),
        "sentence1": facts.sentence1,
        "sentence2": facts.sentence2,
        "dev": facts.dev,
    }
    values["task"] = decided | task
    data = values.get("data")
    if isinstance(data, dict):
        values["data"] = {"config": name} | data


def _has_names(value: object) -> bool:
    """Return whether `value` is a dict whose keys are texts."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _get_task_name(values: dict) -> str | None:
    task = values.get("task")
    name = task.get("name") if isinstance(task, dict) else None
    return name if isinstance(name, str) else None
