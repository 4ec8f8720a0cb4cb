"""A Markdown table of finished runs, one row each, and their loss curves; or a sweep's table and its figures.

--table takes the options of the launch/sweep.py that made the runs; what is not there yet is left empty."""

import argparse
import json
import sys
from pathlib import Path

if (
    not __package__
):  # run as a script: the repository root, not launch/, is where imports are looked up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch import cli
from launch.runtime.errors import UserError, run
from launch.runtime.files import write_text

EXAMPLES = """\
  python launch/report.py runs/quickstart runs/quickstart-lora
  python launch/report.py runs/*/ --figures runs
  python launch/report.py --table miniature --write docs --figures docs"""


def read_results(folder: Path) -> dict:
    """results.json of a run. Raises UserError if the folder is not that of a finished run."""
    try:
        return json.loads((folder / "results.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is not the folder of a finished run: {error}") from None


def method(results: dict) -> str:
    """The method with its variant, such as the end of the spectrum, which is never left out."""
    return " ".join(
        filter(None, (results["method"], results.get("variant", results["eigen_select"])))
    )


def table(folders: list[Path]) -> str:
    """One row a run; scores in percent with their 95 % Wilson interval and n. A score that was not made is empty."""
    rows = [read_results(folder) for folder in folders]
    suites = sorted({suite for row in rows for key in ("baseline", "scores") for suite in row[key]})
    head = ["run", "method", "rank", "lr", "seed", "steps", "final loss"]
    head += [f"{suite} {when}" for suite in suites for when in ("before", "after")] + [
        "training (s)"
    ]
    lines = [head, ["---"] * len(head)]
    for folder, row in zip(folders, rows, strict=True):
        cells = [
            folder.resolve().name,
            method(row),
            row["rank"] or "",
            f"{row['lr']:g}",
            row["seed"],
            row["steps"],
        ]
        cells.append(f"{row['final_loss']:.4f}")
        cells += [_score(row[key].get(suite)) for suite in suites for key in ("baseline", "scores")]
        cells.append(f"{row['seconds']['training']:.0f}")
        lines.append(cells)
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def _score(score: dict | None) -> str:
    if score is None:
        return ""
    low, high = score["interval"]
    return f"{100 * score['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f}, n = {score['n']})"


def _of_runs(arguments: argparse.Namespace) -> None:
    print(table(arguments.runs))
    if arguments.figures:
        from launch.run.plots import plot
        from launch.training.metrics_log import read_metrics

        arguments.figures.mkdir(parents=True, exist_ok=True)
        steps = {
            f"{folder.resolve().name} ({method(read_results(folder))})": read_metrics(folder)
            for folder in arguments.runs
        }
        print("plots: " + " ".join(map(str, plot(steps, arguments.figures))))


def _of_table(arguments: argparse.Namespace) -> None:
    from launch.sweeps import figures as table_figures
    from launch.sweeps import render, summary
    from launch.sweeps.table import read_table

    sweep = read_table(arguments.table, arguments.set, arguments.output)
    groups = summary.collect(sweep)
    shown = render.markdown(sweep, groups)
    print(shown)
    if arguments.write:
        arguments.write.mkdir(parents=True, exist_ok=True)
        texts = {
            "md": shown,
            "tex": render.latex(sweep, groups),
            "csv": render.to_csv(sweep, groups),
        }
        for end, text in texts.items():
            write_text(arguments.write / f"{sweep.name}.{end}", text)
    if arguments.figures:
        arguments.figures.mkdir(parents=True, exist_ok=True)
        print(
            "figures: " + " ".join(map(str, table_figures.draw(sweep, groups, arguments.figures)))
        )


def main() -> None:
    parser = cli.parser(__doc__, EXAMPLES)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders")
    cli.add_table(parser)
    parser.add_argument(
        "--write",
        type=Path,
        metavar="DIR",
        help="also write TABLE.md, TABLE.tex and TABLE.csv there",
    )
    parser.add_argument("--figures", type=Path, metavar="DIR", help="also draw the figures there")
    arguments = parser.parse_args()
    if bool(arguments.runs) == bool(arguments.table):
        raise UserError("give either run folders or --table")
    if arguments.table:
        _of_table(arguments)
    elif arguments.write or arguments.set or arguments.output:
        raise UserError("--write, --set and --output go with --table")
    else:
        _of_runs(arguments)


if __name__ == "__main__":
    run(main)
