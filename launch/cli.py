"""The options that commands share. Light: help and a wrong option answer at once."""

import argparse
import os
from pathlib import Path
from typing import Literal, get_args, get_origin

from launch.config.help import render_field_help
from launch.config.loading import read_recipe
from launch.config.schema import Recipe, Section


class _Parser(argparse.ArgumentParser):
    """A parser whose usage errors, under a launcher, come from rank 0 alone."""

    def error(self, message: str) -> None:
        if int(os.environ.get("RANK", "0")) == 0:
            super().error(message)
        self.exit(2)


def make_parser(description: str, examples: str, fields: bool = False) -> argparse.ArgumentParser:
    """Make a command's parser.

    Args:
        description: the command's docstring.
        examples: lines that --help ends with.
        fields: whether --help also lists the recipe's fields.
    """
    epilog = f"examples:\n{examples}"
    if fields:
        epilog += f"\n\nfields of a recipe (--set FIELD=VALUE):\n{render_field_help()}"
    parser = _Parser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # The deepspeed launcher passes it; LOCAL_RANK says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def add_field_options(parser: argparse.ArgumentParser, section: type[Section], *names: str) -> None:
    """Add an option for each named field of a recipe's section, as the schema declares it.

    The field `batch_size` becomes --batch-size, with the field's type, choices, default and
    description. A boolean field, whose default is False, becomes a switch.
    """
    for name in names:
        field = section.model_fields[name]
        option = f"--{name.replace('_', '-')}"
        # On the command line an option is left out where a recipe says null.
        description = field.description.replace("when null", "by default")
        if field.annotation is bool:
            parser.add_argument(option, action="store_true", help=description)
            continue
        if field.default is not None:
            description += " (default %(default)s)"
        if get_origin(field.annotation) is Literal:
            kind = {"choices": get_args(field.annotation)}
        else:  # a type, or a type and None
            kind = {"type": (get_args(field.annotation) or [field.annotation])[0]}
        parser.add_argument(option, default=field.default, help=description, **kind)


def add_recipe_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the options of a command that runs a recipe."""
    parser.add_argument(
        "--recipe", required=required, help="name of a file in recipes/, or a path to one"
    )
    _add_set_option(parser, "override a field; repeatable")
    parser.add_argument("--engine", help="short for --set engine=ENGINE")
    add_stall_option(parser)


def add_stall_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of every command that runs under a launcher."""
    parser.add_argument(
        "--stall",
        type=float,
        default=600,
        metavar="SECONDS",
        help="end the run when no rank makes progress for so long, or a rank does not come "
        "(default %(default)s)",
    )


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a sweep, for running it and for reporting it."""
    parser.add_argument("--table", help="name of a file in recipes/tables/, or a path to one")
    _add_set_option(parser, "override a field in every run; repeatable")
    parser.add_argument(
        "--output", type=Path, help="folder of the runs (default runs/tables/TABLE)"
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="folder of the small files of finished runs, to be committed. A run that is kept "
        "there is not run again, and launch/sweep.py copies every finished run to it (default: "
        "read docs/results/TABLE, copy nothing)",
    )


def _add_set_option(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=text)


def read_recipe_options(arguments: argparse.Namespace) -> tuple[Recipe, str]:
    """Read the recipe that the options of `add_recipe_options` name. Raises UserError.

    Returns:
        The recipe and its name.
    """
    overrides = list(arguments.set)
    if arguments.engine:
        overrides.append(f"engine={arguments.engine}")
    return read_recipe(arguments.recipe, overrides), Path(arguments.recipe).stem
