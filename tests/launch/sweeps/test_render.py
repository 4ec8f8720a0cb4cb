"""Proves what a table shows in Markdown, LaTeX and CSV: bold, empty cells, published scores, notes.

Needs nothing; takes 10 seconds.
"""

import csv
import io
from pathlib import Path

import pytest

from launch.sweeps.render import escape_latex, list_notes, render_csv, render_latex, render_markdown
from launch.sweeps.summary import collect_groups
from launch.sweeps.table import Cell
from tests.support.sweeps import make_data, make_results, make_sweep, write_results

SCORES = {"a_1": [0.2, 0.21, 0.2], "b": [0.8, 0.81, 0.83], "c": [0.5, 0.5, 0.52]}
SOURCE = "PEFT, examples/corda_finetuning/README.md"


def read_rows(markdown: str) -> dict[str, dict[str, str]]:
    """Return the rows of a table's first block: label -> title -> text."""
    first_block = "| row |" + markdown.split("| row |")[1].split("\n\n")[0]
    lines = first_block.splitlines()
    titles, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: dict(zip(titles, row, strict=True)) for row in rows}


def test_bold_only_where_the_difference_is_significant(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, SCORES)
    shown = render_markdown(sweep, collect_groups(sweep))
    best = read_rows(shown)["b"]
    assert best["gsm8k (%)"] == "**81.3 ± 3.8**"
    assert best["held-out loss"] == "**0.1867 ± 0.0379**"  # the least
    first_block = shown.split("Differences, ")[0]
    assert first_block.count("**") == 4
    tests = shown.split("Differences, at the recipe's learning rate:")[1]
    assert "| held-out loss | b - c | **-0.3067 ± 0.0143** | 3 | 0.000118 | **0.000354** |" in tests

    (tmp_path / "close").mkdir()
    scores = {"a_1": [0.2, 0.5, 0.8], "b": [0.8, 0.3, 0.6], "c": [0.5, 0.2, 0.6]}
    close = make_sweep(tmp_path / "close", scores)
    assert "**" not in render_markdown(close, collect_groups(close))


def test_a_missing_cell_is_empty(tmp_path: Path) -> None:
    scores = {"a_1": [0.2, None, None], "b": [None] * 3, "c": [0.0, 0.0, 0.0]}
    sweep = make_sweep(tmp_path, scores)
    groups = collect_groups(sweep)
    rows = read_rows(render_markdown(sweep, groups))
    a, b, c = rows["a_1"], rows["b"], rows["c"]
    assert (a["seeds"], b["seeds"], c["seeds"]) == ("1 of 3", "0 of 3", "3")
    assert (a["gsm8k (%)"], b["gsm8k (%)"], c["gsm8k (%)"]) == ("20.0", "", "0.0 ± 0.0")
    assert {row[title] for row in (a, b, c) for title in ("math (%)", "mean (%)")} == {""}
    assert (a["peak memory (GiB)"], b["peak memory (GiB)"]) == ("3.00", "")
    # a_1 is lora of rank 128 on Llama-2-7b.
    assert (a["gsm8k published (%)"], b["gsm8k published (%)"]) == (
        "42.68; 42.30; 42.68",
        "",
    )

    lines = list(csv.DictReader(io.StringIO(render_csv(sweep, groups))))
    assert {line["row"] for line in lines} == {"a_1", "c"}
    (line,) = (line for line in lines if (line["row"], line["column"]) == ("a_1", "gsm8k (%)"))
    numbers = (line["mean"], line["low"], line["n"], line["published"])
    assert numbers == ("20.0", "", "1", "42.68; 42.3; 42.68")
    assert line["source"].startswith(f"{SOURCE}; PiSSA's paper")
    assert {line["source"] for line in lines if not line["published"]} == {""}


def test_latex_shows_what_is_special_to_it(tmp_path: Path) -> None:
    escaped = escape_latex("50% of a_1 & {b} ± 2\\")
    assert escaped == r"50\% of a\_1 \& \{b\} $\pm$ 2\textbackslash{}"
    sweep = make_sweep(tmp_path, SCORES)
    shown = render_latex(sweep, collect_groups(sweep))
    assert r"a\_1 & 2e-05 & 3 & 20.3 $\pm$ 1.4 &" in shown
    assert r"\textbf{81.3 $\pm$ 3.8}" in shown
    widths = {line.count(" & ") for line in shown.splitlines() if line.endswith(r"\\")}
    assert widths == {5, 16}  # of the rows, and of the tests between them


def test_latex_typesets_headings_before_the_blocks_and_notes_after(tmp_path: Path) -> None:
    assert escape_latex("p < 0.05 > 0") == "p $<$ 0.05 $>$ 0"
    cells = [Cell(label, rank) for label in ("a_1", "b", "c") for rank in (2, 128)]
    sweep = make_sweep(
        tmp_path,
        {cell: [0.2, 0.21, 0.2] for cell in cells},
        vary={"fields": ["calibration.batch_size", "adapter.rank"], "values": [2, 128]},
    )
    lines = render_latex(sweep, collect_groups(sweep)).splitlines()
    typeset = [line for line in lines if not line.startswith("%")]
    begins = [i for i, line in enumerate(typeset) if line.startswith(r"\begin{tabular}")]
    assert [typeset[i - 1] for i in begins] == [
        rf"\noindent Calibration.batch\_size = {rank}, at the recipe's learning rate:\\*"
        for rank in (2, 128)
    ]
    below = "\n".join(typeset[typeset.index(r"\end{tabular}", begins[-1]) :])
    assert "paired t-test over common seeds, p $<$ 0.05 after" in below
    assert r"Published, of the same protocol: PEFT, examples/corda\_finetuning" in below
    assert "\n".join(typeset).count("{") == "\n".join(typeset).count("}")


def test_what_has_not_been_run_is_named(tmp_path: Path) -> None:
    scores = {"a_1": [0.2, 0.3, None], "b": [0.3, 0.3, 0.3], "c": [None] * 3}
    sweep = make_sweep(tmp_path, scores)
    shown = render_markdown(sweep, collect_groups(sweep))
    assert "Not run yet: a_1: seed 3. c: seed 1, 2, 3." in shown
    nothing = make_sweep(tmp_path, dict.fromkeys(scores, [None] * 3), set={"train.epochs": 2})
    assert "Not run yet: everything." in render_markdown(nothing, collect_groups(nothing))


@pytest.mark.parametrize(
    ("score", "loss", "what"),
    [("held_out", "held-out loss", "rows"), ("other_text", "other-text loss", "text")],
)
def test_a_loss_that_chose_the_exported_step_is_named(
    score: str, loss: str, what: str, tmp_path: Path
) -> None:
    settings = {"train.keep_best": score, "data.held_out": 9, "eval.other_text": "o.txt"}
    sweep = make_sweep(tmp_path, SCORES, set=settings | {"eval.every": 5})
    notes = "\n".join(list_notes(sweep, collect_groups(sweep)))
    assert f"The {loss} chose the step that each run exports" in notes
    assert f"better than it would be on other {what}." in notes
    assert notes.count("train.keep_best") == 1


def test_rows_that_are_kept_apart_and_used_too_are_named(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, SCORES)
    rows = {"tokens_sha256": "d", "kept": 9, "cut": 0}
    counts = {"held_out_trained": 4, "held_out_calibrated": 3}
    data = make_data() | counts | {"dev": {"mrpc": rows | {"trained": 2}}}
    for run in sweep.list_eval_runs(sweep.list_cells()[0])["recipe"]:
        write_results(sweep, run, make_results(0.2, data=data))
    notes = list_notes(sweep, collect_groups(sweep))
    for said in (
        "4 held-out rows are trained on too: their loss is no held-out loss.",
        "3 held-out rows are among those of calibration.data too.",
        "2 of 9 rows of mrpc are trained on too (the same tokens).",
    ):
        assert notes.count(said) == 1


def test_a_note_of_the_runs_and_the_command_stand_in_every_report(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, SCORES)
    run = sweep.list_eval_runs(sweep.list_cells()[0])["recipe"][0]
    write_results(sweep, run, make_results(0.2, note="The base is a stand-in."))
    groups = collect_groups(sweep)
    shown = render_markdown(sweep, groups, {"t_loss.png": "loss"})
    assert shown.startswith("# t\n\n**Note.** The base is a stand-in.\n")
    assert r"\noindent The base is a stand-in.\par" in render_latex(sweep, groups)
    # As the table was given, so that the command works.
    options = f"--table {tmp_path / 't.yaml'} --output {tmp_path / 'runs'}"
    command = f"```bash\npython launch/sweep.py {options}\n```"
    assert shown.endswith(f"![loss](t_loss.png)\n\nMade by:\n\n{command}\n")
    assert "9 finished runs" in shown
