"""Proves what a table's figures and a run's plots show, read from matplotlib's axes.

Needs nothing; takes 20 seconds.
"""

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launch.calibration.effective_rank import (
    EFFECTIVE_RANKS,
    RankChange,
    group_by_layer,
    plot_effective_ranks,
)
from launch.pages.sweep import write_sweep_page
from launch.run import plots
from launch.runtime.files import write_json
from launch.sweeps import report
from launch.sweeps.figures import draw_figures, smooth_runs
from launch.sweeps.report import report_sweep
from launch.sweeps.summary import collect_groups, estimate_mean
from launch.sweeps.table import Cell
from tests.support.html_pages import read_page
from tests.support.sweeps import (
    TABLE,
    make_results,
    make_score,
    make_sweep,
    make_task_score,
    write_results,
)

PNG = b"\x89PNG"
MATTHEWS = "cola matthews, last epoch (%)"


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Every figure that is saved, by its file's name."""
    figures: dict[str, Figure] = {}
    save_figure = plots.save_figure

    def keep(figure: Figure, path: Path) -> Path:
        figures[path.name] = figure
        return save_figure(figure, path)

    monkeypatch.setattr(plots, "save_figure", keep)
    return figures


def read_lines(axis: Axes) -> dict[str, list[float]]:
    """Return x and y of every point of the lines that are in the legend, by label."""
    return {
        line.get_label(): line.get_xydata().ravel().tolist()
        for line in axis.lines
        if line.get_label()[0] != "_"
    }


def read_scores(page: Path) -> dict[str, dict]:
    """Return the figures of a page's scores, by column."""
    charts = read_page(page).get_data("charts-data")
    (figures,) = [chart["figures"] for chart in charts if chart["name"] == "scores"]
    return figures


def test_figures_are_drawn_of_what_is_there(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, {"a_1": [0.2, 0.3, None], "b": [0.3, 0.3, 0.3], "c": [None] * 3})
    paths = draw_figures(sweep, collect_groups(sweep), tmp_path)
    assert {path.name for path in paths} == {
        "t_loss.png",
        "t_grad_norm.png",
        "t_gsm8k.png",
        "t_held-out_loss.png",
    }
    assert all(path.read_bytes().startswith(PNG) for path in paths)


def test_where_something_varies_scores_are_drawn_against_it_and_losses_by_it(
    saved: dict[str, Figure], tmp_path: Path
) -> None:
    scores = {
        Cell("a_1", 2): [0.2, 0.3, 0.4],
        Cell("a_1", 8): [0.4, 0.5, 0.9],
        Cell("b", 2): [0.1, 0.1, 0.4],
        Cell("b", 8): [None] * 3,
    }
    vary = {"fields": ["adapter.rank"], "values": [8, 2]}  # the axis ascends
    rows = {label: TABLE["rows"][label] for label in ("a_1", "b")}
    sweep = make_sweep(tmp_path, scores, vary=vary, rows=rows)
    draw_figures(sweep, collect_groups(sweep), tmp_path)
    assert set(saved) == {"t_loss.png", "t_grad_norm.png", "t_gsm8k.png", "t_held-out_loss.png"}

    (axis,) = saved["t_gsm8k.png"].axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("adapter.rank", "gsm8k (%)")
    lines = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    assert {label: line[0].get_xydata().ravel().tolist() for label, line in lines.items()} == {
        "a_1": pytest.approx([2, 30, 8, 60]),
        "b": pytest.approx([2, 20]),
    }
    intervals = [bar[:, 1].tolist() for bar in lines["a_1"][2][0].get_segments()]
    expected = []
    for rank in (2, 8):
        mean, half = estimate_mean([100 * score for score in scores[Cell("a_1", rank)]])
        expected.append(pytest.approx([mean - half, mean + half]))
    assert intervals == expected
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["2", "8"]

    losses = saved["t_loss.png"].axes  # a panel a row, a line a rank
    assert [axis.get_title() for axis in losses if axis.get_visible()] == ["a_1", "b"]
    assert {axis.get_title(): read_lines(axis) for axis in losses} == {
        "a_1": {"2": pytest.approx([2, 2.7]), "8": pytest.approx([2, 2.4])},
        "b": {"2": pytest.approx([2, 2.8])},
    }

    write_sweep_page(sweep, tmp_path / "page.html")
    trace, _ = read_scores(tmp_path / "page.html")["gsm8k (%)"]["traces"]
    assert (trace["x"], trace["y"]) == ([2, 8], pytest.approx([30, 60]))
    assert trace["error_y"]["array"][1] == pytest.approx((intervals[1][1] - intervals[1][0]) / 2)


def test_a_negative_correlation_is_shown_and_no_percentage_below_0(
    saved: dict[str, Figure], tmp_path: Path
) -> None:
    sweep = make_sweep(tmp_path, {"a_1": [0.0, 0.01, 0.1], "b": [None] * 3, "c": [None] * 3})
    for number, run in enumerate(sweep.list_eval_runs(sweep.list_cells()[0])["recipe"]):
        values = {"matthews": -0.3 - 0.1 * number}
        scores = {"gsm8k": make_score(0.05 * number), "cola": make_task_score(values, values)}
        write_results(sweep, run, make_results(0.0, scores=scores))
    draw_figures(sweep, collect_groups(sweep), tmp_path)
    write_sweep_page(sweep, tmp_path / "page.html")
    figures = read_scores(tmp_path / "page.html")
    shown = {}
    for file, title in (("gsm8k", "gsm8k (%)"), ("cola_matthews_last_epoch", MATTHEWS)):
        (axis,) = saved[f"t_{file}.png"].axes
        shown[title] = (axis.get_xlim()[0], figures[title]["layout"]["xaxis"]["minallowed"])
    # Means -40 and 5, intervals of 25 and 12 points (t(0.975, 2) = 4.303 times 10 and 5 / sqrt(3)).
    assert shown == {"gsm8k (%)": (-2, -2), MATTHEWS: (pytest.approx(-40 - 25, abs=3), -102)}


def test_a_list_may_vary(saved: dict[str, Figure], tmp_path: Path) -> None:
    values = [["q_proj"], ["q_proj", "v_proj"]]
    sweep = make_sweep(
        tmp_path,
        {f"a_1 {value}": [0.2, 0.3, 0.4] for value in values},
        vary={"fields": ["adapter.targets"], "values": values},
        rows={"a_1": TABLE["rows"]["a_1"]},
    )
    draw_figures(sweep, collect_groups(sweep), tmp_path)
    (axis,) = saved["t_gsm8k.png"].axes
    assert [tick.get_text() for tick in axis.get_xticklabels()] == list(map(str, values))
    write_sweep_page(sweep, tmp_path / "page.html")


def test_the_texts_of_a_report_are_written_before_its_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sweep = make_sweep(tmp_path, {"a_1": [0.2, 0.3, 0.4], "b": [0.3] * 3, "c": [None] * 3})
    report_sweep(sweep, tmp_path / "whole", tmp_path / "whole")
    assert "![loss](t_loss.png)" in (tmp_path / "whole" / "t.md").read_text()
    monkeypatch.setattr(report, "draw_figures", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report_sweep(sweep, tmp_path / "texts", tmp_path / "texts")
    names = {path.name for path in (tmp_path / "texts").iterdir()}
    assert names == {"t.md", "t.tex", "t.csv", "t_tests.csv"}


def test_runs_of_different_length_are_averaged_as_far_as_each_goes() -> None:
    steps, mean, low, high = smooth_runs([[1.0] * 6, [3.0] * 8])
    assert steps.tolist() == [3, 4, 5, 6]
    assert mean.tolist() == pytest.approx([2, 2, 3, 3])
    assert low.tolist() == pytest.approx([1, 1, 3, 3])
    assert high.tolist() == pytest.approx([3, 3, 3, 3])
    assert smooth_runs([[1.0], [3.0] * 2])[1].tolist() == [2, 3]
    _, mean, _, _ = smooth_runs([[1.0, 2.0], [math.nan, 3.0]])
    assert np.isnan(mean).all()  # a number that is not finite is not left out


def test_curves_of_runs_differ_in_more_than_colour(
    saved: dict[str, Figure], tmp_path: Path
) -> None:
    runs = {}
    for i in range(8):
        runs[f"run {i}"] = [
            {"step": 1, "loss": i, "grad_norm": 2 * i},
            {"step": 2, "loss": 0, "grad_norm": 0},
        ]
    plots.plot_runs(runs, tmp_path)
    axes = saved["loss.png"].axes
    lines = {label: points for axis in axes for label, points in read_lines(axis).items()}
    assert lines == {f"run {i}": [1, i, 2, 0] for i in range(8)}
    for axis in axes:
        told_apart = [line for line in axis.lines if line.get_label() in read_lines(axis)]
        assert len(axis.lines) == 8  # the others are grey
        assert len({line.get_linestyle() for line in told_apart}) == len(told_apart)
        assert len({line.get_marker() for line in told_apart}) == len(told_apart)
    assert read_lines(saved["grad_norm.png"].axes[0])["run 3"] == [1, 6, 2, 0]


def test_scores_while_training_have_a_row_of_panels_each(
    saved: dict[str, Figure], tmp_path: Path
) -> None:
    runs = {}
    for i in range(8):
        runs[f"run {i}"] = [{"step": step, "loss": 1, "grad_norm": 1} for step in range(1, 5)]
        for step in (2, 4):
            dev = {"held_out": {"loss": i + step / 8}, "gsm8k": {"accuracy": i / 8}}
            runs[f"run {i}"][step - 1]["dev"] = dev if i else {"held_out": {"loss": step / 8}}
    assert plots.plot_runs(runs, tmp_path)[-1] == tmp_path / "scores.png"
    axes = saved["scores.png"].axes
    assert [axis.get_ylabel() for axis in axes] == ["held_out: loss"] * 2 + ["gsm8k: accuracy"] * 2
    held_out = read_lines(axes[0]) | read_lines(axes[1])
    assert held_out == {f"run {i}": [2, i + 0.25, 4, i + 0.5] for i in range(8)}
    assert read_lines(axes[3])["run 7"] == [2, 7 / 8, 4, 7 / 8]


def read_marks(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    """Return the ticks and the dots of every panel, by its title."""
    panels = {}
    for axis in figure.axes:
        marks = {line.get_marker(): list(line.get_xdata()) for line in axis.lines}
        panels[axis.get_title()] = (marks["|"], marks["o"])
    return panels


def test_effective_ranks_are_drawn_before_and_after(
    saved: dict[str, Figure], tmp_path: Path
) -> None:
    """A run's figure shows every layer, a table's the mean over the layers of each row."""
    sweep = make_sweep(tmp_path, {"a_1": [0.2, 0.3, 0.2], "b": [0.3, 0.3, 0.3], "c": [None] * 3})
    names = [f"layers.{layer}.{kind}" for layer in range(2) for kind in ("q_proj", "up_proj")]
    for number, cell in enumerate(sweep.list_cells()[:2], start=1):
        changes = {name: RankChange(1.0 + i, 10.0 * number + i) for i, name in enumerate(names)}
        path = sweep.folder / sweep.list_eval_runs(cell)["recipe"][0].name / EFFECTIVE_RANKS
        path.parent.mkdir()
        write_json(path, {name: change._asdict() for name, change in changes.items()})

    paths = [plot_effective_ranks(group_by_layer(changes), tmp_path / "effective_rank.png")]
    paths += draw_figures(sweep, collect_groups(sweep), tmp_path)
    assert read_marks(saved["effective_rank.png"]) == {
        "q_proj": ([1, 3], [20, 22]),
        "up_proj": ([2, 4], [21, 23]),
    }
    assert read_marks(saved["t_effective_rank.png"]) == {
        "q_proj": ([2, 2], [11, 21]),
        "up_proj": ([3, 3], [12, 22]),
    }
    assert all(path.read_bytes().startswith(PNG) for path in paths)
