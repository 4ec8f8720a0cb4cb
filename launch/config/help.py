"""The recipe's fields for --help."""

from launch.config.overrides import format_value
from launch.config.schema import Recipe, find_section


def render_field_help() -> str:
    """Return one line for each field of a recipe: name, description and default."""
    fields = {}
    for name, field in Recipe.model_fields.items():
        section = find_section(field.annotation)
        if section is None:
            fields[name] = field
        else:
            fields |= {f"{name}.{key}": inner for key, inner in section.model_fields.items()}
    lines = []
    for name, field in fields.items():
        default = "required" if field.is_required() else f"default {format_value(field.default)}"
        lines.append(f"  {name:<30} {field.description} ({default})")
    return "\n".join(lines)
