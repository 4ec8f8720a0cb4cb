"""Tokenise a recipe's rows once, for runs to take as data.prepared, and say what was kept, cut and dropped. Started
again, it goes on after the last finished part; on a finished folder it checks every byte."""

import json
import sys
from pathlib import Path

if (
    not __package__
):  # run as a script: the repository root, not launch/, is where imports are looked up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.tasks import GROUPS, TASKS
from launch import cli
from launch.config.schema import Recipe
from launch.runtime.errors import UserError, run
from launch.runtime.files import write_json, write_text

EXAMPLES = """\
  python launch/prepare.py --recipe metamath --output prepared/metamath
  python launch/prepare.py --recipe metamath --output prepared/metamath --check-overlap gsm8k math
  deepspeed launch/train.py --recipe metamath --set data.prepared=prepared/metamath"""


def main() -> None:
    parser = cli.parser(__doc__, EXAMPLES, fields=True)
    cli.add_recipe(parser)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the tokens and of report.md"
    )
    parser.add_argument(
        "--check-overlap",
        nargs="+",
        default=[],
        metavar="SUITE",
        choices=[*TASKS, *GROUPS],
        help="also report rows that share a question or a 13-gram with these suites, read as eval.data_dir says",
    )
    arguments = parser.parse_args()
    recipe, _ = cli.read_recipe(arguments)
    if recipe.data.prepared is not None:
        raise UserError("data.prepared: is what --output makes; leave it out here")

    from launch.quickstart import (
        base as quickstart,
    )  # takes seconds, so only when the recipe is known to be good
    from launch.runtime.distributed import on_rank0, start, stop

    recipe = quickstart.resolve(recipe, start(arguments.stall))
    on_rank0(
        lambda: prepare(recipe, arguments.output, arguments.check_overlap)
    )  # a fast tokenizer uses all cores
    stop()


def prepare(recipe: Recipe, folder: Path, suites: list[str]) -> None:
    """Make the folder whole, compare it with `suites`, write and print the report. Raises UserError."""
    from launch.data import inputs, overlap
    from launch.data import sources as rows
    from launch.data import token_cache as prepared
    from launch.runtime.model_files import fetch_model

    model_path = fetch_model(recipe.model.name, recipe.model.revision, weights=False)
    inputs.check_length(recipe, model_path)
    path = rows.fetch(recipe.data)
    manifest = prepared.make(folder, recipe.data, model_path, path, verify=True).manifest
    kept_overlap = folder / "overlap.json"
    overlaps = (
        json.loads(kept_overlap.read_text(encoding="utf-8")) if kept_overlap.is_file() else {}
    )
    if suites:
        overlaps |= overlap.check(recipe, suites)
        write_json(kept_overlap, overlaps)
    report = describe(recipe, manifest, overlaps)
    write_text(folder / "report.md", report)
    print(report, flush=True)
    prepared.accept(manifest, recipe.data)


def describe(recipe: Recipe, manifest: dict, overlaps: dict[str, dict]) -> str:
    """The report, in Markdown."""
    data, source = recipe.data, manifest["made_from"]["source"]
    revision = (
        f"commit {source['commit']}"
        if "commit" in source
        else f"revision {data.revision}, unverified"
    )
    lines = [
        f"# Tokens of {data.path}",
        "",
        f"Split {data.split}, {revision}; tokenizer of {recipe.model.name}; at most {data.max_length} tokens a row.",
        "",
        "| rows | |",
        "|---|---|",
        f"| read | {manifest['read']} |",
        f"| passed over: not in data.keep | {manifest['read'] - manifest['selected']} |",
        *(
            f"| dropped: {reason} | {count} |"
            for reason, count in sorted(manifest["dropped"].items())
        ),
        f"| kept | {manifest['kept']} |",
        f"| of them, answer cut at {data.max_length} tokens | {manifest['cut']} |",
        "",
        f"{manifest['tokens']} tokens, {manifest['answer_tokens']} of them of answers; "
        f"SHA-256 {manifest['tokens_sha256']}.",
    ]
    if manifest["examples"]:
        lines += ["", "First rows of each reason:", ""]
        lines += [
            f"- row {row}: {what}"
            for reason in sorted(manifest["examples"])
            for row, what in manifest["examples"][reason]
        ]
    if overlaps:
        lines += ["", "## Overlap with evaluation suites", ""]
        lines += [
            "| suite | rows | share a question | share 13 words only | problems met | left out as phrases |"
        ]
        lines += ["|---|---|---|---|---|---|"]
        lines += [
            f"| {name} | {of['rows']} | {of['question']} | {of['13-gram']} | {of['problems']} of {of['of']} | "
            f"{of['phrases']} 13-grams |"
            for name, of in overlaps.items()
        ]
        lines += [
            "",
            *(_example(example) for of in overlaps.values() for example in of["examples"]),
        ]
    return "\n".join(lines) + "\n"


def _example(example: dict) -> str:
    return f"- row {example['row']} and {example['problem']} share a {example['shares']}: {example['text']}"


if __name__ == "__main__":
    run(main)
