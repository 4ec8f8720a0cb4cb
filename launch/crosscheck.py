"""Compare our numbers with those of lm-eval and evalplus.

Of a folder of launch/evaluate.py: lm-eval's graders of gsm8k and math and evalplus' base check of
programs, on the same responses; and, of the same model, lm-eval's own responses and its likelihoods
of the commonsense choices, which are another metric. Of a file of responses, or of the benchmarks'
own answers: the graders alone. Needs requirements-crosscheck.txt, but no network."""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: imports are to be looked up from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.tasks import BENCHMARKS, GROUPS
from launch import cli
from launch.config.schema import Model
from launch.runtime.entry import run_command
from launch.runtime.errors import UserError

EXAMPLES = """\
  python launch/evaluate.py --model MODEL --data-dir data --suite gsm8k --max-new-tokens 128 --limit 20 --output scores
  python launch/crosscheck.py --scores scores --data-dir data
  python launch/crosscheck.py --scores responses.jsonl --output checked  # rows: suite, output, and reference or id
  python launch/crosscheck.py --references --suite gsm8k --suite humaneval --data-dir data --output checked"""


def main() -> None:
    arguments = _make_parser().parse_args()
    if arguments.output is None and (arguments.references or arguments.scores.is_file()):
        raise UserError("--output: is required unless --scores is a folder")
    folder = arguments.output or arguments.scores / "crosscheck"

    # Imported when the options are known to be good: it takes seconds.
    from launch.scoring.crosscheck import crosscheck_references, crosscheck_scores

    if arguments.references:
        crosscheck_references(arguments.suite, arguments.data_dir, arguments.limit, folder)
    else:
        crosscheck_scores(
            arguments.scores, arguments.suite, arguments.data_dir, arguments.revision, folder
        )


def _make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--scores", type=Path, help="folder of launch/evaluate.py, or a file of responses"
    )
    source.add_argument(
        "--references", action="store_true", help="the benchmarks' own answers as the responses"
    )
    add(
        "--suite",
        action="append",
        choices=[*BENCHMARKS, *GROUPS],
        help="only these; repeatable (default all of --scores)",
    )
    add(
        "--data-dir",
        type=Path,
        help="folder with the benchmarks' files (default: that of --scores, or the hub)",
    )
    add(
        "--limit",
        type=int,
        help="with --references: problems of each benchmark, the first so many (default all)",
    )
    cli.add_field_options(parser, Model, "revision")
    add(
        "--output",
        type=Path,
        help="folder for differences.jsonl and lm-eval's task files (default: in --scores)",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
