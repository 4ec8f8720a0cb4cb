"""The report: statistics by hand and by scipy, cells that are not there, three formats, published numbers."""

import csv
import io
import json
import sys
from pathlib import Path

import pytest
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from launch import sweep as sweep_command
from launch.config.schema import RECIPES
from launch.run import plots as figures
from launch.runtime.errors import UserError
from launch.runtime.files import write_json
from launch.sweeps import figures as table_figures
from launch.sweeps import render, summary
from launch.sweeps.summary import differ, mean_interval
from launch.sweeps.table import Run, Sweep, Unit, read_table

TABLE = {
    "recipe": "metamath",
    "seeds": [1, 2, 3],
    "suites": ["gsm8k", "math"],
    "rows": {
        "a_1": {"set": {"adapter.method": "lora"}},
        "b": {"set": {"adapter.eigen_select": "largest"}},
        "c": {"set": {"adapter.eigen_select": "middle"}},
    },
}


def result(accuracy: float, **others: object) -> dict:
    return {
        "base": {"name": "m", "weights_sha256": "w"},
        "data": {"path": "d", "tokens_sha256": "t"},
        "dtype": "float32",
        "other_text_source": {"path": "o", "sha256": "o"},
        "scores": {"gsm8k": {"accuracy": accuracy, "n": 200, "data_sha256": "g"}},
        "seconds": {"calibration": 1.0, "training": 2.0},
        "held_out": {"before": {"loss": 2.0}, "after": {"loss": 1 - accuracy}},
        "other_text": {
            "before": {"loss": 1.0, "accuracy": 0.5},
            "after": {"loss": 1.5, "accuracy": 0.25},
        },
        "trained_parameters": 3_000_000,
        "peak_memory": [2**30, 3 * 2**30],
        "conditions": {"git_revision": "r", "world_size": 2, "device": "cpu"},
    } | others


def place(sweep: Sweep, run: Run, results: dict) -> None:
    (sweep.folder / run.name).mkdir(parents=True, exist_ok=True)
    (sweep.folder / run.name / "results.json").write_text(json.dumps(results))


def sweep_with(folder: Path, scores: dict[str | Unit, list], **others: object) -> Sweep:
    """A table's sweep, with runs of these accuracies by row (or unit) and seed; None has not been run."""
    (folder / "t.yaml").write_text(yaml.safe_dump(TABLE | others))
    sweep = read_table(str(folder / "t.yaml"), (), folder / "runs")
    for unit in sweep.units():
        for run, accuracy in zip(
            sweep.scored(unit)["recipe"],
            scores[unit.label if unit.value is None else unit],
            strict=True,
        ):
            if accuracy is not None:
                place(sweep, run, result(accuracy))
                steps = [
                    {"step": i, "loss": 5 - i - accuracy, "grad_norm": 0.1 + i} for i in range(1, 4)
                ]
                (sweep.folder / run.name / "metrics.jsonl").write_text(
                    "".join(json.dumps(s) + "\n" for s in steps)
                )
    return sweep


def test_interval_of_a_mean() -> None:
    values = [0.51, 0.62, 0.55]
    low, high = stats.t.interval(0.95, 2, loc=0.56, scale=stats.sem(values))
    point = mean_interval(values)
    assert (point.mean - point.half, point.mean + point.half) == pytest.approx((low, high))
    # By hand: s = 0.0556776, t(0.975, 2) = 4.302653, so half of it is 4.302653 s / sqrt(3).
    assert point.half == pytest.approx(4.302653 * 0.0556776 / 3**0.5, rel=1e-5)
    assert mean_interval([0.5]) == (0.5, None)
    assert mean_interval([]) is None


def test_same_seeds_are_compared_in_pairs_and_others_by_welch() -> None:
    first, second = {1: 50.0, 2: 60.0, 3: 70.0}, {1: 48.0, 2: 58.1, 3: 67.9}
    assert stats.ttest_rel([*first.values()], [*second.values()]).pvalue < 0.05
    assert stats.ttest_ind([*first.values()], [*second.values()], equal_var=False).pvalue > 0.5
    assert differ(first, second)
    assert not differ(first, {4: 48.0, 5: 58.1, 6: 67.9})
    assert differ({1: 50.0, 2: 50.1}, {3: 20.0, 4: 20.1})


def test_one_seed_or_no_difference_decides_nothing() -> None:
    assert not differ({1: 90.0}, {1: 10.0})
    assert not differ({1: 5.0, 2: 6.0}, {1: 5.0, 2: 6.0})


def test_differences_without_spread_decide_nothing() -> None:
    assert not differ({1: 50.5, 2: 60.5}, {1: 50.0, 2: 60.0})  # coarse scores, the same gap twice
    assert not differ({1: 0.3, 2: 0.8}, {1: 0.2, 2: 0.7})  # the same but for rounding
    assert not differ({1: 50.5, 2: 50.5}, {3: 50.0, 4: 50.0})
    assert differ({1: 50.0, 2: 60.0, 3: 70.0}, {1: 40.0, 2: 50.1, 3: 60.0})


def test_bold_only_where_the_difference_is_significant(tmp_path: Path) -> None:
    sweep = sweep_with(
        tmp_path, {"a_1": [0.2, 0.21, 0.2], "b": [0.8, 0.81, 0.83], "c": [0.5, 0.5, 0.52]}
    )
    shown = render.markdown(sweep, summary.collect(sweep))
    line = next(line for line in shown.splitlines() if line.startswith("| b |"))
    assert "**81.3 ± 3.8**" in line  # gsm8k, best
    assert "**0.1867 ± 0.0379**" in line  # held-out loss, least
    assert shown.count("**") == 4
    (tmp_path / "close").mkdir()
    close = sweep_with(
        tmp_path / "close", {"a_1": [0.2, 0.5, 0.8], "b": [0.8, 0.3, 0.6], "c": [0.5, 0.2, 0.6]}
    )
    assert "**" not in render.markdown(close, summary.collect(close))


def test_a_mean_that_is_not_finite_is_neither_best_nor_in_the_way(tmp_path: Path) -> None:
    scores = {"a_1": [0.2, 0.21, 0.2], "b": [0.8, 0.81, 0.83], "c": [0.5, 0.5, 0.52]}
    sweep = sweep_with(tmp_path, scores)
    for run in sweep.scored(sweep.units()[2])["recipe"]:
        place(sweep, run, result(0.5, held_out={"after": {"loss": float("nan")}}))
    groups = summary.collect(sweep)
    column = next(
        column for column in summary.table_columns(sweep, groups) if column.title == "held-out loss"
    )
    assert [summary.best(order, column) for order in (groups, groups[::-1], groups[1:])] == [
        1,
        1,
        None,
    ]


def test_a_missing_cell_is_empty(tmp_path: Path) -> None:
    sweep = sweep_with(tmp_path, {"a_1": [0.2, None, None], "b": [None] * 3, "c": [0.0, 0.0, 0.0]})
    lines = {
        line.split(" |")[0]: line
        for line in render.markdown(sweep, summary.collect(sweep)).splitlines()
    }
    cells = {
        label: [cell.strip() for cell in line.split("|")[1:-1]]
        for label, line in lines.items()
        if "|" in line
    }
    head = cells["| row"]
    a, b, c = (dict(zip(head, cells[f"| {label}"], strict=True)) for label in ("a_1", "b", "c"))
    assert (a["seeds"], b["seeds"], c["seeds"]) == ("1 of 3", "0 of 3", "3")
    assert (a["gsm8k (%)"], b["gsm8k (%)"], c["gsm8k (%)"]) == ("20.0", "", "0.0 ± 0.0")
    assert {of[title] for of in (a, b, c) for title in ("math (%)", "mean (%)")} == {""}
    assert (a["peak memory (GiB)"], b["peak memory (GiB)"]) == ("3.00", "")
    assert (a["gsm8k published (%)"], b["gsm8k published (%)"]) == (
        "42.68",
        "",
    )  # lora, rank 128, Llama-2-7b
    rows = list(csv.DictReader(io.StringIO(render.to_csv(sweep, summary.collect(sweep)))))
    assert {row["row"] for row in rows} == {"a_1", "c"}
    of_a = next(row for row in rows if row["row"] == "a_1" and row["column"] == "gsm8k (%)")
    assert (of_a["mean"], of_a["low"], of_a["n"], of_a["published"]) == ("20.0", "", "1", "42.68")
    assert of_a["source"] == "the READMEs of PEFT's CorDA example and of CorDA"
    assert {row["source"] for row in rows if not row["published"]} == {""}


def test_latex_shows_what_is_special_to_it(tmp_path: Path) -> None:
    assert (
        render.escape("50% of a_1 & {b} ± 2\\") == r"50\% of a\_1 \& \{b\} $\pm$ 2\textbackslash{}"
    )
    sweep = sweep_with(
        tmp_path, {"a_1": [0.2, 0.21, 0.2], "b": [0.8, 0.81, 0.83], "c": [0.5, 0.5, 0.52]}
    )
    shown = render.latex(sweep, summary.collect(sweep))
    assert r"a\_1 & 2e-05 & 3 & 20.3 $\pm$ 1.4 &" in shown
    assert r"\textbf{81.3 $\pm$ 3.8}" in shown
    widths = {line.count(" & ") for line in shown.splitlines() if line.endswith(r"\\")}
    assert len(widths) == 1


def test_latex_typesets_headings_before_the_blocks_and_notes_after(tmp_path: Path) -> None:
    assert render.escape("p < 0.05 > 0") == "p $<$ 0.05 $>$ 0"
    runs = {Unit(label, rank): [0.2, 0.21, 0.2] for label in ("a_1", "b", "c") for rank in (2, 128)}
    sweep = sweep_with(
        tmp_path,
        runs,
        vary={"fields": ["calibration.batch_size", "adapter.rank"], "values": [2, 128]},
    )
    lines = render.latex(sweep, summary.collect(sweep)).splitlines()
    typeset = [line for line in lines if not line.startswith("%")]
    begins = [i for i, line in enumerate(typeset) if line.startswith(r"\begin{tabular}")]
    assert [typeset[i - 1] for i in begins] == [
        rf"\noindent Calibration.batch\_size = {rank}, at the recipe's learning rate:\\*"
        for rank in (2, 128)
    ]
    below = "\n".join(typeset[typeset.index(r"\end{tabular}", begins[-1]) :])
    assert "gives p $<$ 0.05 (paired t-test" in below
    assert r"Published: the READMEs of PEFT's CorDA example and of CorDA.\par" in below
    assert "\n".join(typeset).count("{") == "\n".join(typeset).count("}")


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (
            {"base": {"name": "m", "weights_sha256": "other"}},
            "content of model.name meta-llama/Llama-2-7b-hf",
        ),
        (
            {"data": {"path": "d", "tokens_sha256": "other"}},
            "content of data.path meta-math/MetaMathQA",
        ),
        ({"dtype": "bfloat16"}, "dtype"),
        (
            {"other_text_source": {"path": "o", "sha256": "other"}},
            "content of eval.other_text o.txt",
        ),
        (
            {"scores": {"gsm8k": {"accuracy": 0.3, "n": 200, "data_sha256": "other"}}},
            "content of suite gsm8k",
        ),
    ],
)
def test_runs_made_with_other_inputs_are_not_mixed(other: dict, name: str, tmp_path: Path) -> None:
    scores = {"a_1": [0.2, 0.2, 0.2], "b": [0.3, 0.3, 0.3], "c": [None] * 3}
    sweep = sweep_with(tmp_path, scores, set={"eval.other_text": "o.txt"})
    summary.collect(sweep)
    run = sweep.scored(sweep.units()[1])["recipe"][0]
    place(sweep, run, result(0.3) | other)
    with pytest.raises(UserError, match=f"{run.name} was made with another {name} than "):
        summary.collect(sweep)
    place(
        sweep, run, {key: value for key, value in result(0.3).items() if key not in other}
    )  # not yet recorded
    summary.collect(sweep)


def test_runs_that_choose_a_rate_are_made_with_the_same_inputs(tmp_path: Path) -> None:
    rates = {"grid": [1e-5, 1e-4], "seed": 0, "common": 1e-5}
    (tmp_path / "t.yaml").write_text(
        yaml.safe_dump(TABLE | {"learning_rates": rates, "set": {"data.held_out": 9}})
    )
    sweep = read_table(str(tmp_path / "t.yaml"), (), tmp_path / "runs")
    first, second = sweep.choosing(sweep.units()[0]).values()
    place(sweep, first, result(0.2, scores={}))
    summary.collect(sweep)
    place(sweep, second, result(0.2, scores={}, dtype="bfloat16"))
    with pytest.raises(
        UserError, match=f"{second.name} was made with another dtype than .*{first.name}"
    ):
        summary.collect(sweep)


def test_a_changed_recipe_makes_new_rows_and_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text((RECIPES / "metamath.yaml").read_text())
    scores = {"a_1": [0.2, 0.21, 0.2], "b": [0.8, 0.81, 0.83], "c": [None] * 3}
    old = sweep_with(tmp_path, scores, recipe=str(recipe))
    options = ["--table", str(tmp_path / "t.yaml"), "--output", str(old.folder)]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *options, "--list"])

    def listed() -> dict[str, str]:
        """Run -> is it there, as sweep.py --list has it."""
        sweep_command.main()
        lines = capsys.readouterr().out.splitlines()
        return {line.split()[1]: line.split()[0] for line in lines if line.startswith("    ")}

    def files() -> dict[Path, tuple[bytes, int]]:
        return {
            path: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in old.folder.rglob("*")
            if path.is_file()
        }

    before, kept = listed(), files()
    assert sorted(before.values()) == ["done"] * 6 + ["missing"] * 3
    values = yaml.safe_load(recipe.read_text())
    values["train"] = values.get("train", {}) | {"weight_decay": 0.125}
    recipe.write_text(yaml.safe_dump(values))
    after = listed()
    assert sorted(after.values()) == ["missing"] * 9
    assert not after.keys() & before.keys()

    new = read_table(str(tmp_path / "t.yaml"), (), old.folder)
    run = new.scored(new.units()[0])["recipe"][0]
    place(new, run, result(0.4))
    assert listed() == after | {run.name: "done"}
    shown = render.markdown(new, summary.collect(new))
    assert "| a_1 | 2e-05 | 1 of 3 | 40.0 |" in shown
    assert "| b | 2e-05 | 0 of 3 |  |" in shown
    assert {path: of for path, of in files().items() if run.name not in path.parts} == kept


@pytest.mark.parametrize(
    "field",
    [
        "model.name: p",
        "model.revision: p",
        "data.limit: 7",
        "data.max_length: 7",
        "data.keep: {type: p}",
    ],
)
def test_rows_on_other_models_or_rows_have_other_tokens(field: str, tmp_path: Path) -> None:
    rows = {"a": {}, "b": {"set": yaml.safe_load(field)}}
    sweep = sweep_with(tmp_path, {"a": [0.2, 0.2, 0.2], "b": [None] * 3}, rows=rows)
    for run in sweep.scored(sweep.units()[1])["recipe"]:
        place(sweep, run, result(0.3, data={"path": "d", "tokens_sha256": "of b"}))
    assert [len(group.results) for group in summary.collect(sweep)] == [3, 3]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Every figure that is saved, by its file's name."""
    kept, save = {}, figures.save
    monkeypatch.setattr(
        figures, "save", lambda of, path: kept.setdefault(path.name, of) and save(of, path)
    )
    return kept


def test_figures_are_drawn_of_what_is_there(tmp_path: Path) -> None:
    sweep = sweep_with(tmp_path, {"a_1": [0.2, 0.3, None], "b": [0.3, 0.3, 0.3], "c": [None] * 3})
    made = table_figures.draw(sweep, summary.collect(sweep), tmp_path)
    assert {path.name for path in made} == {
        "t_loss.png",
        "t_grad_norm.png",
        "t_gsm8k.png",
        "t_held-out_loss.png",
    }
    for path in made:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_where_something_varies_scores_are_drawn_against_it_and_losses_by_it(
    drawn: dict[str, Figure], tmp_path: Path
) -> None:
    of = {"a_1": {2: [0.2, 0.3, 0.4], 8: [0.4, 0.5, 0.9]}, "b": {2: [0.1, 0.1, 0.4], 8: [None] * 3}}
    runs = {
        Unit(label, rank): values for label, ranks in of.items() for rank, values in ranks.items()
    }
    vary = {"fields": ["adapter.rank"], "values": [2, 8]}
    rows = {label: TABLE["rows"][label] for label in of}
    sweep = sweep_with(tmp_path, runs, vary=vary, rows=rows)
    table_figures.draw(sweep, summary.collect(sweep), tmp_path)
    assert set(drawn) == {"t_loss.png", "t_grad_norm.png", "t_gsm8k.png", "t_held-out_loss.png"}

    (axis,) = drawn["t_gsm8k.png"].axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("adapter.rank", "gsm8k (%)")
    lines = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    assert {label: line[0].get_xydata().ravel().tolist() for label, line in lines.items()} == {
        "a_1": pytest.approx([2, 30, 8, 60]),
        "b": pytest.approx([2, 20]),
    }
    ends = [bar[:, 1].tolist() for bar in lines["a_1"][2][0].get_segments()]
    halves = [
        mean_interval([100 * value for value in values]).half for values in of["a_1"].values()
    ]
    assert ends == [
        pytest.approx([30 - halves[0], 30 + halves[0]]),
        pytest.approx([60 - halves[1], 60 + halves[1]]),
    ]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["2", "8"]

    losses = drawn["t_loss.png"].axes
    assert [axis.get_title() for axis in losses if axis.get_visible()] == [
        "a_1",
        "b",
    ]  # a panel a row, a line a rank
    assert {axis.get_title(): labelled(axis) for axis in losses} == {
        "a_1": {"2": pytest.approx([2, 2.7]), "8": pytest.approx([2, 2.4])},
        "b": {"2": pytest.approx([2, 2.8])},
    }


def labelled(axis: Axes) -> dict[str, list[float]]:
    """Label -> x and y of every point, of the lines that are in the legend."""
    return {
        line.get_label(): line.get_xydata().ravel().tolist()
        for line in axis.lines
        if line.get_label()[0] != "_"
    }


def test_curves_of_runs_differ_in_more_than_colour(
    drawn: dict[str, Figure], tmp_path: Path
) -> None:
    runs = {
        f"run {i}": [
            {"step": 1, "loss": i, "grad_norm": 2 * i},
            {"step": 2, "loss": 0, "grad_norm": 0},
        ]
        for i in range(8)
    }
    figures.plot(runs, tmp_path)
    axes = drawn["loss.png"].axes
    assert {label: points for axis in axes for label, points in labelled(axis).items()} == {
        f"run {i}": [1, i, 2, 0] for i in range(8)
    }
    for axis in axes:
        own = [line for line in axis.lines if line.get_label() in labelled(axis)]
        assert len(axis.lines) == 8  # the others are grey
        assert len({line.get_linestyle() for line in own}) == len(own)
        assert len({line.get_marker() for line in own}) == len(own)
    assert labelled(drawn["grad_norm.png"].axes[0])["run 3"] == [1, 6, 2, 0]


def test_effective_ranks_are_drawn_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run every layer, of a table the mean over the layers of every row: a tick is before, a dot after."""
    drawn: dict[str, dict] = {}

    def look(of: Figure, path: Path) -> Path:
        if path.name.endswith("effective_rank.png"):
            for axis in of.axes:
                marks = {line.get_marker(): list(line.get_xdata()) for line in axis.lines}
                drawn.setdefault(path.name, {})[axis.get_title()] = (marks["|"], marks["o"])
        return save(of, path)

    save = figures.save
    monkeypatch.setattr(figures, "save", look)
    sweep = sweep_with(tmp_path, {"a_1": [0.2, 0.3, 0.2], "b": [0.3, 0.3, 0.3], "c": [None] * 3})
    names = [f"layers.{layer}.{kind}" for layer in range(2) for kind in ("q_proj", "up_proj")]
    for number, unit in enumerate(sweep.units()[:2], start=1):
        modules = {
            name: {"before": 1.0 + i, "after": 10.0 * number + i} for i, name in enumerate(names)
        }
        folder = sweep.folder / sweep.scored(unit)["recipe"][0].name / "after"
        folder.mkdir()
        write_json(folder / "effective_rank.json", modules)
    made = [figures.effective_rank(figures.by_layer(modules), tmp_path / "effective_rank.png")]
    assert drawn["effective_rank.png"] == {
        "q_proj": ([1, 3], [20, 22]),
        "up_proj": ([2, 4], [21, 23]),
    }
    made += table_figures.draw(sweep, summary.collect(sweep), tmp_path)
    assert drawn["t_effective_rank.png"] == {
        "q_proj": ([2, 2], [11, 21]),
        "up_proj": ([3, 3], [12, 22]),
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
