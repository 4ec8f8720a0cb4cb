"""Check command lines of this repository without running them.

A command's own parser reads its options: its `main` is called, and ends as soon as
`ArgumentParser.parse_args` has accepted them. Recipes, tables and --set are then checked with the
functions that the commands use.
"""

import argparse
import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

from launch.config.loading import read_recipe
from launch.runtime.errors import USER_ERRORS
from launch.sweeps.table import read_table
from tests.support.paths import ROOT

PYTHON = ("python", "python3")
LAUNCHERS = ("deepspeed", "torchrun", "srun")
SCRIPT = re.compile(r"(\./)?(launch|bench|recipes|eval|tests)/\S+\.(py|sh|sbatch)")
ASSIGNMENT = re.compile(r"(?:export +)?(\w+)=(\"[^\"]*\"|'[^']*'|[^\s\"']*)(?: +#.*)?")
# Scripts that pass their arguments on to a command.
FORWARDED = {
    "launch/cluster/slurm.sbatch": ["launch/train.py", "--recipe", "metamath"],
    "launch/cluster/sweep.sbatch": ["launch/sweep.py"],
}
# The recipe and the table with which --set is checked where the user's own is not here.
RECIPE, TABLE = "metamath", "maths"


class _Accepted(BaseException):
    """Ends a command whose options were accepted."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options


def split_commands(line: str) -> list[list[str]]:
    """Split a shell line into the words of its simple commands. Raises ValueError if it cannot."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>()")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";&|<>()"):
            commands.append([])
        else:
            commands[-1].append(word)
    return [_drop_assignments(words) for words in commands if words]


def _drop_assignments(words: list[str]) -> list[str]:
    """Drop the environment variables that stand before a command."""
    first = 0
    while first < len(words) and re.match(r"[A-Za-z_]\w*=", words[first]):
        first += 1
    return words[first:]


def find_all_faults(lines: Iterable[str]) -> list[str]:
    """Describe what is wrong in the lines of a page, where variables hold from line to line."""
    variables: dict[str, str] = {}
    faults = []
    for line in lines:
        assigned = ASSIGNMENT.fullmatch(line)
        if assigned:
            variables[assigned[1]] = assigned[2].strip("'\"")
            continue
        expanded = line
        for name, value in variables.items():
            expanded = re.sub(rf"\$({name}\b|{{{name}}})", lambda _, value=value: value, expanded)
        faults += [f"{line}\n    {fault}" for fault in find_faults(expanded)]
    return faults


def find_faults(line: str) -> list[str]:
    """Describe what is wrong in a shell line's commands of this repository; [] for others."""
    try:
        commands = split_commands(line)
    except ValueError as error:
        return [f"cannot be parsed: {error}"] if SCRIPT.search(line) else []
    faults = [_find_fault(words) for words in commands if words]
    return [fault for fault in faults if fault]


def _find_fault(words: list[str]) -> str | None:
    """Describe what is wrong in one command, or return None."""
    program = Path(words[0]).name
    if program == "make":
        return _find_make_fault(words[1:])
    if program not in (*PYTHON, *LAUNCHERS, "sbatch", "bash"):
        return None
    found = [i for i, word in enumerate(words) if SCRIPT.fullmatch(word)]
    if not found:
        return None
    script, arguments = words[found[0]].removeprefix("./"), words[found[0] + 1 :]
    if not (ROOT / script).is_file():
        return f"{script}: no such file"
    if script in FORWARDED:
        script, *first = FORWARDED[script]
        arguments = [*first, *arguments]
    elif script.startswith("recipes/"):
        script, arguments = "launch/train.py", ["--recipe", Path(script).stem, *arguments]
    return _find_option_fault(script, tuple(arguments))


def _find_make_fault(words: list[str]) -> str | None:
    """Describe a target that the Makefile lacks, or wrong options that a variable passes on."""
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    targets = [word for word in words if "=" not in word and not word.startswith("-")]
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in targets:
        if target not in known:
            return f"make {target}: no such target"
    if "miniature" in targets:
        table = variables.get("TABLE", "miniature")
        options = shlex.split(variables.get("OPTIONS", ""))
        return _find_option_fault("launch/sweep.py", ("--table", table, *options))
    return None


@functools.cache
def _find_option_fault(script: str, arguments: tuple[str, ...]) -> str | None:
    """Describe an option, name or field that the script would refuse, or return None."""
    if not script.startswith(("launch/", "bench/")):
        return None
    try:
        options = _parse_options(script, list(arguments))
        _check_names(options)
    except (ValueError, *USER_ERRORS) as error:
        return f"{script}: {error}"
    return None


def _parse_options(script: str, arguments: list[str]) -> argparse.Namespace:
    """Return what the script's own parser makes of the arguments.

    Raises:
        ValueError: the parser refuses them, or the script never parses them.
    """
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(parser: argparse.ArgumentParser, *given: Any) -> None:
        parser.allow_abbrev = False  # a page spells options out
        raise _Accepted(parse(parser, *given))

    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [script, *arguments]),
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_end),
        contextlib.redirect_stderr(printed),
        contextlib.redirect_stdout(printed),
    ):
        try:
            load_main(script)()
        except _Accepted as accepted:
            return accepted.options
        except SystemExit as end:
            if end.code == 0:  # --help
                return argparse.Namespace()
            raise ValueError(printed.getvalue().strip().splitlines()[-1]) from None
    raise ValueError("its main() does not parse its arguments")


@functools.cache
def load_script(script: str) -> dict[str, Any]:
    """Return the globals of a script that is loaded but not run."""
    with mock.patch.object(sys, "path", list(sys.path)):  # scripts change it
        return runpy.run_path(str(ROOT / script), run_name="loaded")


def load_main(script: str) -> Callable[[], None]:
    """Return a script's `main`."""
    return load_script(script)["main"]


def _check_names(options: argparse.Namespace) -> None:
    """Check --recipe, --table and --set. Raises UserError."""
    settings = [setting for setting in getattr(options, "set", None) or [] if "$" not in setting]
    settings = [setting for setting in settings if setting != "FIELD=VALUE"]
    recipe, table = getattr(options, "recipe", None), getattr(options, "table", None)
    if isinstance(recipe, str):
        engine = getattr(options, "engine", None)
        settings += [f"engine={engine}"] if engine else []
        read_recipe(RECIPE if _is_elsewhere(recipe) else recipe, settings)
    elif isinstance(table, str):
        read_table(TABLE if _is_elsewhere(table) else table, settings)


def _is_elsewhere(name: str) -> bool:
    """Return whether a recipe or table is a variable, a placeholder such as T, or a user's file."""
    own_file = name.endswith(".yaml") and not name.startswith("recipes/")
    return "$" in name or name.isupper() or own_file
