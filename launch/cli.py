"""What the commands share on the command line. Light: help and a wrong option answer at once."""

import argparse
import os
from pathlib import Path

from launch.config.schema import Recipe, field_help, read


class _Parser(argparse.ArgumentParser):
    """Under a launcher, usage errors come from rank 0 alone."""

    def error(self, message: str) -> None:
        if int(os.environ.get("RANK", "0")) == 0:
            super().error(message)
        self.exit(2)


def parser(description: str, examples: str, fields: bool = False) -> argparse.ArgumentParser:
    """A parser with examples, the recipe's fields if asked for, and the launchers' --local_rank."""
    epilog = f"examples:\n{examples}"
    if fields:
        epilog += f"\n\nfields of a recipe (--set FIELD=VALUE):\n{field_help()}"
    result = _Parser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # deepspeed passes it; LOCAL_RANK says the same
    return result


def add_recipe(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The options of a command that runs a recipe."""
    parser.add_argument(
        "--recipe", required=required, help="name of a file in recipes/, or a path to one"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="override a field; repeatable",
    )
    parser.add_argument("--engine", help="short for --set engine=ENGINE")
    add_stall(parser)


def add_stall(parser: argparse.ArgumentParser) -> None:
    """The option of every command that runs under a launcher."""
    parser.add_argument(
        "--stall",
        type=float,
        default=600,
        metavar="SECONDS",
        help="end the run when no rank makes progress for so long, or ranks do not come (default %(default)s)",
    )


def add_table(parser: argparse.ArgumentParser) -> None:
    """The options that name a sweep, for running it and for reporting it."""
    parser.add_argument("--table", help="name of a file in recipes/tables/, or a path to one")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="override a field in every run; repeatable",
    )
    parser.add_argument(
        "--output", type=Path, help="folder of the runs (default runs/tables/TABLE)"
    )


def read_recipe(arguments: argparse.Namespace) -> tuple[Recipe, str]:
    """The recipe that the options of add_recipe name, and its name. Raises UserError."""
    engine = [f"engine={arguments.engine}"] if arguments.engine else []
    return read(arguments.recipe, arguments.set + engine), Path(arguments.recipe).stem
