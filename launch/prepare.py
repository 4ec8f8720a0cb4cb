"""Tokenise a recipe's rows once, for runs to take as data.prepared, and report what they hold.

Started again, it resumes after the last finished part. On a finished folder it checks every
byte."""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: imports are to be looked up from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.tasks import BENCHMARKS, GROUPS
from launch import cli
from launch.runtime.entry import run_command
from launch.runtime.errors import UserError

EXAMPLES = """\
  python launch/prepare.py --recipe metamath --output prepared/metamath
  python launch/prepare.py --recipe metamath --output prepared/metamath --check-overlap gsm8k math
  deepspeed launch/train.py --recipe metamath --set data.prepared=prepared/metamath"""


def main() -> None:
    arguments = _make_parser().parse_args()
    recipe, _ = cli.read_recipe_options(arguments)
    if recipe.data.prepared is not None:
        raise UserError("data.prepared: is what --output makes; leave it out here")

    # Imported when the recipe is known to be good: it takes seconds.
    from launch.data.preparation import prepare_tokens
    from launch.quickstart import base as quickstart
    from launch.runtime.distributed import run_on_rank0, start_process_group, stop_process_group

    recipe = quickstart.resolve_quickstart(recipe, start_process_group(arguments.stall))
    # On one rank: a fast tokenizer uses all cores.
    run_on_rank0(lambda: prepare_tokens(recipe, arguments.output, arguments.check_overlap))
    stop_process_group()


def _make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, EXAMPLES, fields=True)
    cli.add_recipe_options(parser)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the tokens and of report.md"
    )
    parser.add_argument(
        "--check-overlap",
        nargs="+",
        default=[],
        metavar="SUITE",
        choices=[*BENCHMARKS, *GROUPS],
        help="also report rows that share a question or a 13-gram with these benchmarks, read as "
        "eval.data_dir says",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
