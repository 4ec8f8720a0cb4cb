"""Read a recipe from a YAML file and overrides, check it, and write it.

Every problem is a UserError of one line that names the field.
"""

import difflib
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from launch.config.overrides import format_value, parse_override, parse_yaml, set_field
from launch.config.schema import Recipe, find_section
from launch.config.section import Section, SectionT
from launch.config.task_settings import (
    apply_task_settings,
    drop_set_fields,
    fill_glue_fields,
    merge_task_settings,
)
from launch.runtime.errors import UserError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
# Fields that were renamed, `section.field` within one section. The old name works for one release.
RENAMED_FIELDS = {"data.keep": "data.filter"}
# Fields that came later and change no result: hashes are without them.
UNHASHED_FIELDS = ("calibration.reduction", "note")
# Fields whose default has changed: hashes have the earlier one in the place of the present one.
EARLIER_DEFAULTS = {"calibration.memory_gib": ("auto", None)}  # (now, earlier)
# Fields and sections that came later: hashes are without them where they are at their defaults.
ADDED_FIELDS = (
    "export",
    "model.new_weights",
    "adapter.exclude",
    "adapter.start",
    "train.lr_ratio",
    "shard_within",
    "calibration.data.sentence1",
    "calibration.data.sentence2",
    "calibration.data",
    "data.messages",
    "data.chat_template",
    "data.train_on",
    "data.sources",
    "eval.chat_template",
    "task",
    "train.head_lr",
    "train.keep_best",
    "train.patience",
    "eval.every",
    "eval.every_suites",
    "eval.every_limit",
)


def read_recipe(source: str, overrides: list[str]) -> Recipe:
    """Read the recipe named `source`, with overrides applied.

    `extends: NAME` in a recipe takes over the fields of another one that it does not set itself, and
    `by_task: {NAME: {field: value}}` has settings for some values of task.name. Of a task of GLUE the
    fields that it decides need not be set (launch.config.task_settings).

    Args:
        source: name of a file in recipes/, or a path.
        overrides: `a.b=value`, the values in YAML; of two for the same field the last one counts.

    Raises:
        UserError: unknown recipe or key, bad value, unreadable file; one line that names it.
    """
    values, old_names = _load_values(find_yaml(source, RECIPES, "--recipe"))
    pairs = [parse_override(override) for override in overrides]
    _refuse_both_names([field for field, _ in pairs])
    apply_task_settings(values, pairs)
    for field, value in pairs:
        renamed = _rename_field(field)
        if renamed != field:
            old_names.append(_find_old_name(field))
        set_field(values, renamed, value)
        old_names += _rename_fields(values)  # in a value that is a whole section
    for old in old_names:
        _announce_new_name(old)
    fill_glue_fields(values)
    return validate_recipe(values)


def read_stored_recipe(path: Path) -> Recipe:
    """Read recipe.yaml of a run folder. Old names of fields are not announced. Raises UserError."""
    values, _ = _load_values(path)
    return validate_recipe(values)


def validate_recipe(values: dict) -> Recipe:
    """Make the recipe of nested `values`; see `read_recipe` for errors."""
    return validate_section(Recipe, values)


def validate_section(kind: type[SectionT], values: dict) -> SectionT:
    """Make one section of given values; see `read_recipe` for errors."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain_error(error, kind)) from None


def dump_recipe(recipe: Recipe, old_names: bool = False) -> str:
    """Return the recipe with every field as YAML, which `read_recipe` reads.

    Args:
        recipe: to be dumped.
        old_names: whether renamed fields get their old names.
    """
    values = recipe.model_dump()
    if old_names:
        _restore_old_names(values)
    return yaml.safe_dump(values, sort_keys=False)


def dump_for_hash(recipe: Recipe) -> str:
    """Return the recipe as YAML that stays the same from version to version, to be hashed."""
    values = recipe.model_dump()
    _restore_old_names(values)
    _drop_added_fields(recipe, values)
    for name in UNHASHED_FIELDS:
        section, _, field = name.partition(".")
        del (values[section] if field else values)[field or section]
    for name, (now, earlier) in EARLIER_DEFAULTS.items():
        section, field = name.split(".")
        if values[section][field] == now:
            values[section][field] = earlier
    return yaml.safe_dump(values, sort_keys=False)


def _drop_added_fields(recipe: Recipe, values: dict) -> None:
    """Remove ADDED_FIELDS that are at their defaults from the recipe's nested `values`."""
    for name in ADDED_FIELDS:
        *sections, key = name.split(".")
        holder, inner = recipe, values
        for section in sections:
            holder, inner = getattr(holder, section), inner.get(section)
        if inner is not None and holder.is_default(key):
            del inner[key]


def _restore_old_names(values: dict) -> None:
    """Give renamed fields in nested `values` their old names."""
    for old, new in RENAMED_FIELDS.items():
        _rename_in_section(values, new, old)


def find_difference(old: Recipe, new: Recipe, ignore: tuple[str, ...] = ()) -> str | None:
    """Return the first field whose values differ, or None.

    Args:
        old: recipe of before.
        new: recipe of now.
        ignore: fields and whole sections that may differ.

    Returns:
        `section.field (old value, now new value)`.
    """
    before, after = flatten_recipe(old), flatten_recipe(new)
    for name in dict.fromkeys([*after, *before]):
        there, here = before.get(name), after.get(name)  # a recipe may lack a source of the other
        ignored = name in ignore or name.split(".")[0] in ignore
        if there != here and not ignored:
            return f"{name} ({format_value(there)}, now {format_value(here)})"
    return None


def flatten_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's values by `section.field`, or by `field` outside of sections.

    Those of each source of a mix are by `data.sources.NAME.field`.
    """
    flat: dict[str, Any] = {}
    for name, value in recipe.model_dump().items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    for name, rows in flat.pop("data.sources").items():
        flat |= {f"data.sources.{name}.{key}": inner for key, inner in rows.items()}
    return flat


def find_yaml(source: str, folder: Path, option: str) -> Path:
    """Find the YAML file called `source` in `folder`, or at that path.

    Raises:
        UserError: there is none; the message names `option`.
    """
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if source in names:
        return folder / f"{source}.yaml"
    path = Path(source).expanduser()
    if path.is_file():
        return path
    near = difflib.get_close_matches(source, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"{option}: no {option.strip('-')} or file {source!r}; {hint}there are: {', '.join(names)}"
    )


def load_yaml(path: Path, option: str) -> dict:
    """Load the fields of a YAML file. Raises UserError naming `option`."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{option}: {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{option}: {path} holds no fields; start from a file in {RECIPES.name}/")
    return values


def load_extended(path: Path, folder: Path, option: str) -> Iterator[dict]:
    """Yield the fields of a YAML file, then those of each file that it extends, in turn.

    Args:
        path: of the file.
        folder: of the files that `extends` may name without a path.
        option: that errors name.

    Raises:
        UserError: a file is not there or cannot be read; or it extends itself.
    """
    file, seen = path, {path}
    while True:
        values = load_yaml(file, option)
        extends = values.pop("extends", None)
        yield values
        if not extends:
            return
        file = find_yaml(str(extends), folder, option)
        if file in seen:
            raise UserError(f"{option}: {path} extends itself, through {file.stem}")
        seen.add(file)


# Renamed fields


def _load_values(path: Path) -> tuple[dict, list[str]]:
    """Load a recipe's values under the fields' new names, and list the old names in it.

    Raises:
        UserError: the file, or one that it extends, cannot be read; or it extends itself.
    """
    values: dict[str, Any] = {}
    old_names: list[str] = []
    for extended in load_extended(path, RECIPES, "--recipe"):
        old_names += _rename_fields(extended)
        drop_set_fields(extended, values)
        values = _merge_sections(extended, values)
    return values, old_names


def _merge_sections(base: dict, values: dict) -> dict:
    """Return nested `base` with the fields of `values` in their place."""
    merged = base | values
    for name, section in base.items():
        if isinstance(section, dict) and isinstance(values.get(name), dict):
            merged[name] = section | values[name]
    return merged | merge_task_settings(base, values)


def _rename_fields(values: dict) -> list[str]:
    """Give renamed fields in nested `values` their new names.

    Returns:
        The old names that were there.

    Raises:
        UserError: a field is there under both names.
    """
    found = []
    for old, new in RENAMED_FIELDS.items():
        if _rename_in_section(values, old, new):
            found.append(old)
    return found


def _rename_in_section(values: dict, old: str, new: str) -> bool:
    """Rename field `old` of nested `values` to `new`, in its place.

    Returns:
        Whether it was there.

    Raises:
        UserError: both were there.
    """
    (section, old_key), new_key = old.split("."), new.split(".")[1]
    fields = values.get(section)
    if not isinstance(fields, dict) or old_key not in fields:
        return False
    _refuse_both_names([f"{section}.{key}" for key in fields])
    values[section] = {new_key if key == old_key else key: value for key, value in fields.items()}
    return True


def _rename_field(field: str) -> str:
    """Return the new name of a field, or of what is inside of one."""
    old = _find_old_name(field)
    return field if old is None else RENAMED_FIELDS[old] + field.removeprefix(old)


def _find_old_name(field: str) -> str | None:
    """Return the renamed field that `field` is, or is inside of, by its old name."""
    return next((old for old in RENAMED_FIELDS if f"{field}.".startswith(f"{old}.")), None)


def _refuse_both_names(fields: list[str]) -> None:
    """Raise UserError if a field is given under its old and its new name."""
    for old, new in RENAMED_FIELDS.items():
        given = [any(f"{field}.".startswith(f"{name}.") for field in fields) for name in (old, new)]
        if all(given):
            raise UserError(f"{old}: is the old name of {new}, which is given too; leave {old} out")


@functools.cache
def _announce_new_name(old: str) -> None:
    """Say on rank 0, once in a process, that a field has a new name."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            f"{old} is called {RENAMED_FIELDS[old]} now; the old name works for one release",
            file=sys.stderr,
            flush=True,
        )


# Errors


def _explain_error(error: ValidationError, kind: type[Section]) -> str:
    """Return the first problem in one line; unknown keys come first, for they may cause others."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem, more = problems[0], len(problems) - 1
    where = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "extra_forbidden":
            text = f"{where}: unknown key; {_suggest_key(problem['loc'], kind)}"
        case "missing":
            remedy = f"the recipe or with --set {where}=VALUE" if kind is Recipe else "the file"
            text = f"{where}: is required; set it in {remedy}"
        case "value_error" if isinstance(problem["input"], dict):
            # Of a whole section: the message names the field.
            text = f"{where}{'.' if where else ''}{problem['ctx']['error']}"
        case _:
            text = f"{where}: {problem['input']!r} is not valid: {problem['msg']}"
    return text + (f" (and {more} more)" if more else "")


def _suggest_key(location: tuple, kind: type[Section]) -> str:
    """Return the known key that is nearest to the unknown one at `location`, or all known keys."""
    for part in location[:-1]:  # names of fields, keys of mappings, indices of lists
        if part in kind.model_fields:
            kind = find_section(kind.model_fields[part].annotation) or kind
    known = list(kind.model_fields)
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {'.'.join([*map(str, location[:-1]), near[0]])}?"
    return f"known: {', '.join(known)}"
