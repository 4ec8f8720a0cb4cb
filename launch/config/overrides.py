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
        return field, parse_yaml(value)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or "it cannot be read"
        raise UserError(f"--set: the value of {text!r} is not YAML; quote it ({reason})") from None


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain values. Raises yaml.YAMLError, also where a mapping has a key twice."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader takes the last of two equal keys without a word; YAML forbids them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Construct a mapping, whose keys must differ. A merge (`<<`) may bring what is overridden."""
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        for key, where in zip(keys, own, strict=True):
            if keys.count(key) > 1:
                problem = f"{key} is there twice; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, where.start_mark)
        return super().construct_mapping(node, deep)


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
