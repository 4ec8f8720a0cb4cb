"""Overrides of a recipe on the command line: --set section.field=value, the value in YAML."""

from typing import Any

import yaml

from launch.runtime.errors import UserError


def parse_override(text: str) -> tuple[str, Any]:
    """Split `a.b=value` into its field and its value. Raises UserError."""
    field, equals, value = text.partition("=")
    if not equals or not field:
        raise UserError(f"--set: {text!r} is not of the form a.b=value")
    try:
        return field, yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set: the value of {text!r} is not YAML; quote it") from None


def set_field(values: dict, field: str, value: Any) -> None:
    """Set field `a.b` in nested `values`. Raises UserError if `a` is there and has no fields."""
    *parents, last = field.split(".")
    for parent in parents:
        if values.get(parent) is None:  # also a section that is null
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise UserError(f"--set: {field}: {parent} has no fields of its own")
    values[last] = value


def format_value(value: Any) -> str:
    """Return `value` as --set takes it, in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
