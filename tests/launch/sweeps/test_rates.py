"""Proves how a row's learning rate is found: grids that extend, stop, resume and are never mixed.

Every run is a process of a stand-in for the trainer, whose held-out loss is a known function of the
rate. Needs nothing; takes 10 seconds.
"""

import csv
import io
import json
import math
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from launch.pages.sweep import write_sweep_page
from launch.run import plots
from launch.runtime.errors import UserError
from launch.sweeps import jobs
from launch.sweeps.curves import collect_rate_curves, format_loss
from launch.sweeps.rate_figure import draw_rate_curves
from launch.sweeps.rates import choose_next_rate, find_step, make_grid, make_rate
from launch.sweeps.render import render_markdown, render_rates_csv
from launch.sweeps.report import report_sweep
from launch.sweeps.summary import collect_groups
from launch.sweeps.table import Cell, Sweep, read_table
from tests.support.html_pages import read_page
from tests.support.sweeps import make_held_out, make_results, write_results

# Its arguments are those of launch/train.py. $TRAINER names a file that says at which rate the loss
# is least, from which rate on a run diverges, and how many starts succeed.
TRAINER = """
import json, math, os, sys
from pathlib import Path

words = sys.argv[2:]
folder = Path(words[words.index("--output") + 1])
values = dict(word.split("=", 1) for word in words if "=" in word)
lr, seed = float(values["train.lr"]), int(values["train.seed"])
settings = json.loads(Path(os.environ["TRAINER"]).read_text())
log = Path(settings["log"])
with log.open("a") as file:
    file.write(f"{folder.name}\\n")
if len(log.read_text().splitlines()) > settings["fail_after"]:
    sys.exit(1)
folder.mkdir(parents=True, exist_ok=True)
if lr >= settings["diverges_from"]:
    state = {"state": "diverged", "host": "h", "pid": 1, "error": "step 3: not finite"}
    (folder / "state.json").write_text(json.dumps(state))
    sys.exit(2)
results = settings["results"]
distance = math.log10(lr) - math.log10(settings["best"])
loss = 1 + distance**2 + 0.001 * seed
results["held_out"]["after"]["loss"] = loss
results |= {"lr": lr, "seed": seed}
steps = [{"step": i, "loss": loss / i, "grad_norm": 1.0} for i in (1, 2, 3)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\\n" for step in steps))
(folder / "results.json").write_text(json.dumps(results))
"""
TABLE = {
    "recipe": "quickstart",
    "set": {"data.held_out": 20, "train.max_steps": 5},
    "seeds": [1, 2, 3],
    "learning_rates": {"grid": [3.16e-4, 5.62e-4, 1e-3], "extend": True, "seed": 0},
    "suites": [],
    "rows": {"lora": {"set": {"adapter.method": "lora"}}},
}
LORA = Cell("lora", None)


class Trainer:
    """A stand-in for the trainer, and the sweeps that it serves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.launcher = [sys.executable, "-I", str(folder / "trainer.py")]
        (folder / "trainer.py").write_text(TRAINER)
        self.log = folder / "log"
        self.set_up()

    def set_up(
        self, best: float = 5.62e-4, diverges_from: float = 1.0, fail_after: int = 1000
    ) -> None:
        """Set at which rate the loss is least, and which runs end in another way."""
        results = make_results(0.5, scores={})
        settings = {"log": str(self.log), "results": results, "best": best}
        settings |= {"diverges_from": diverges_from, "fail_after": fail_after}
        (self.folder / "trainer.json").write_text(json.dumps(settings))
        self.log.write_text("")

    def read_table(
        self, overrides: Sequence[str] = (), kept: Path | None = None, **fields: object
    ) -> Sweep:
        """Read TABLE with other fields; its runs are in one folder."""
        path = self.folder / "t.yaml"
        path.write_text(yaml.safe_dump(TABLE | fields))
        return read_table(str(path), overrides, self.folder / "runs", kept)

    def run(self, sweep: Sweep, num_slots: int = 1, keep: bool = False) -> int:
        """Run what is missing of a sweep and return the exit code."""
        return jobs.run_sweep(sweep, sweep.list_cells(), num_slots, self.launcher, keep)

    def list_started(self) -> list[str]:
        """List the names of the runs that were started, without their hashes, in order."""
        return [name.rpartition("-")[0] for name in self.log.read_text().splitlines()]


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """The stand-in. A sweep's signal handlers are left out: they would be those of pytest."""
    monkeypatch.setattr(jobs, "Stop", lambda: SimpleNamespace(requested=False))
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.002)
    monkeypatch.setenv("TRAINER", str(tmp_path / "trainer.json"))
    return Trainer(tmp_path)


def name_runs(rates: Sequence[float], seeds: Sequence[int] = (0,)) -> list[str]:
    """Return what `list_started` has of runs at these rates, each with every seed."""
    return [f"lora-lr{rate:g}-seed{seed}" for rate in rates for seed in seeds]


@pytest.mark.parametrize(
    ("best", "diverges_from", "expected", "own"),
    [
        (5.62e-4, 1, [], 5.62e-4),
        (1.9e-3, 1, [1.78e-3, 3.16e-3], 1.78e-3),
        (6e-5, 1, [1.78e-4, 1e-4, 5.62e-5, 3.16e-5], 5.62e-5),
        (1, 3.16e-3, [1.78e-3, 3.16e-3], 1.78e-3),
        (1, 1e-3, [], 5.62e-4),
        (1, 3e-5, [1.78e-4, 1e-4, 5.62e-5, 3.16e-5, 1.78e-5, 1e-5], 1.78e-5),
        (1, 1, [1.78e-3, 3.16e-3, 5.62e-3, 1e-2, 1.78e-2, 3.16e-2], 3.16e-2),
    ],
    ids=[
        "interior",
        "above",
        "below",
        "divergence ends it above",
        "divergence within the grid",
        "all of the grid diverges",
        "last rate allowed",
    ],
)
def test_a_grid_extends_at_the_best_rates_end_and_stops(
    best: float, diverges_from: float, expected: list[float], own: float, trainer: Trainer
) -> None:
    trainer.set_up(best, diverges_from)
    sweep = trainer.read_table()
    assert trainer.run(sweep) == 0
    grid = TABLE["learning_rates"]["grid"]
    rates = [*grid, *expected]
    # One rate after the other, and then fresh seeds at the best: not the one that chose it.
    assert trainer.list_started() == [*name_runs(rates), *name_runs([own], [1, 2, 3])]
    assert sweep.choose_rate(LORA) == own
    trainer.set_up(best, diverges_from)
    assert trainer.run(sweep) == 0
    assert trainer.list_started() == []


def test_where_every_rate_diverges_the_row_is_named(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.set_up(diverges_from=0)
    assert trainer.run(trainer.read_table()) == 1
    assert len(trainer.list_started()) == 3 + len(range(find_step(3.16e-4), -24, -1))
    assert "failed: lora: every learning rate from 1e-06 to 0.001 diverged" in (
        capsys.readouterr().err
    )


def test_a_row_whose_every_rate_diverged_is_named_at_each_value_and_not_as_work_left(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.set_up(diverges_from=0)
    rates = {"grid": [1e-3], "seed": 0}
    vary = {"fields": ["adapter.rank"], "values": [2, 4]}
    sweep = trainer.read_table(learning_rates=rates, vary=vary)
    assert "Not run yet: everything." in render_markdown(sweep, collect_groups(sweep))
    assert trainer.run(sweep) == 1
    printed = capsys.readouterr().err
    assert "failed: lora 2: every learning rate" in printed
    assert "failed: lora 4: every learning rate" in printed
    shown = render_markdown(sweep, collect_groups(sweep))
    assert "Every learning rate diverged: lora 2, lora 4." in shown
    assert "Not run yet" not in shown


def test_a_loss_that_is_not_finite_is_an_end() -> None:
    assert choose_next_rate({1e-3: 0.5, 1.78e-3: 0.4, 3.16e-3: math.inf}) is None
    assert choose_next_rate({1e-3: 0.4, 1.78e-3: 0.5, 3.16e-3: math.inf}) == 5.62e-4
    assert choose_next_rate({1e-3: 0.4}) == 5.62e-4
    assert choose_next_rate({5.62e-4: 0.5, 1e-3: 0.4}) == 1.78e-3
    assert choose_next_rate({1e-6: 0.4, 1.78e-6: 0.5}) is None
    assert choose_next_rate({1e-4: 0.4, 3.16e-4: 0.5, 1e-3: 0.6}) == 3.16e-5
    assert choose_next_rate({1e-4: 0.5, 3.16e-4: 0.4}) == 1e-3
    assert choose_next_rate({1e-3: 0.5, 3.16e-3: 0.4, 1e-2: 0.3}) == 3.16e-2
    assert choose_next_rate({3.16e-3: 0.4, 1.78e-2: 0.3}) is None  # the next is beyond the end


def test_the_neighbours_of_the_best_are_run_with_every_seed_where_the_table_says_so(
    trainer: Trainer,
) -> None:
    rates = TABLE["learning_rates"] | {"neighbours": True, "common": 2e-5}
    sweep = trainer.read_table(learning_rates=rates)
    assert jobs.count_jobs(sweep, LORA) == 3 + 3 * 3 + 3
    assert trainer.run(sweep) == 0
    assert set(trainer.list_started()) == {
        *name_runs([3.16e-4, 5.62e-4, 1e-3], [0, 1, 2, 3]),
        *name_runs([2e-5], [1, 2, 3]),
    }
    assert list(sweep.list_eval_runs(LORA)) == ["own", "below", "above", "common"]


@pytest.mark.parametrize("num_slots", [1, 3])
def test_a_sweep_that_fails_halfway_resumes_to_the_same_runs(
    num_slots: int, trainer: Trainer
) -> None:
    rows = {"lora": TABLE["rows"]["lora"], "rslora": {"set": {"adapter.method": "rslora"}}}
    sweep = trainer.read_table(rows=rows)
    started: list[str] = []
    for fail_after in (0, 2, 5, 1000):
        trainer.set_up(best=3e-3, fail_after=fail_after)
        assert trainer.run(sweep, num_slots) == (1 if fail_after < 1000 else 0)
        started += trainer.list_started()[:fail_after]
    rates = [3.16e-4, 5.62e-4, 1e-3, 1.78e-3, 3.16e-3, 5.62e-3]
    runs = [*name_runs(rates), *name_runs([3.16e-3], [1, 2, 3])]
    assert sorted(started) == sorted([*runs, *(f"rs{name}" for name in runs)])


def test_runs_of_other_settings_or_seeds_choose_nothing(trainer: Trainer) -> None:
    trainer.set_up(best=1e-4)
    assert trainer.run(trainer.read_table(["train.max_steps=6"])) == 0
    assert (
        trainer.run(trainer.read_table(learning_rates=TABLE["learning_rates"] | {"seed": 7})) == 0
    )
    trainer.set_up()
    sweep = trainer.read_table()
    assert sweep.read_tuning_losses(LORA) == dict.fromkeys([3.16e-4, 5.62e-4, 1e-3])
    assert trainer.run(sweep) == 0
    assert sweep.choose_rate(LORA) == 5.62e-4


def test_runs_of_another_model_or_another_torch_choose_nothing(trainer: Trainer) -> None:
    sweep = trainer.read_table()
    first = sweep.folder / sweep.list_tuning_runs(LORA)[1e-3].name
    first.mkdir(parents=True)
    others = {
        "content of model.name quickstart": {"base": {"name": "m", "weights_sha256": "other"}},
        "version of torch": {
            "conditions": {"git_revision": "r", "world_size": 1, "device": "cpu", "torch": "1.0"}
        },
    }
    settings = json.loads((trainer.folder / "trainer.json").read_text())
    settings["results"]["conditions"]["torch"] = "2.0"
    (trainer.folder / "trainer.json").write_text(json.dumps(settings))
    for name, other in others.items():
        results = settings["results"] | other
        (first / "results.json").write_text(json.dumps(results))
        with pytest.raises(UserError, match=f"was made with another {name} than"):
            trainer.run(sweep)
        assert len(trainer.list_started()) == 1  # it is not found before a run has ended
        trainer.log.write_text("")
        shutil.rmtree(sweep.folder / sweep.list_tuning_runs(LORA)[3.16e-4].name)


def test_a_sweep_starts_from_kept_runs_and_the_report_is_the_same_from_them_alone(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = trainer.folder / "kept"
    trainer.set_up(best=1.9e-3, diverges_from=3e-3, fail_after=4)
    assert trainer.run(trainer.read_table(kept=kept), keep=True) == 1
    assert len(list(kept.iterdir())) == 4
    shutil.rmtree(trainer.folder / "runs")
    trainer.set_up(best=1.9e-3, diverges_from=3e-3)
    capsys.readouterr()
    assert trainer.run(trainer.read_table(kept=kept), keep=True) == 0
    assert f"4 of them are kept in {kept}" in capsys.readouterr().out
    assert trainer.list_started() == [*name_runs([3.16e-3]), *name_runs([1.78e-3], [1, 2, 3])]

    def report(folder: Path) -> dict[str, bytes]:
        report_sweep(trainer.read_table(kept=kept), folder, folder)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    with_runs = report(trainer.folder / "first")
    shutil.rmtree(trainer.folder / "runs")
    assert report(trainer.folder / "second") == with_runs
    files = [path for path in kept.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"results.json", "metrics.jsonl", "state.json"}
    (diverged,) = kept.rglob("state.json")
    assert set(json.loads(diverged.read_text())) == {"state", "error"}  # not the host


def test_a_report_has_the_curve_the_best_and_its_neighbours(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.set_up(best=1.9e-3, diverges_from=3e-3)
    sweep = trainer.read_table()
    assert trainer.run(sweep, num_slots=3) == 0
    (curve,) = collect_rate_curves(sweep)
    assert [format_loss(point).split(":")[0] for point in curve.list_neighbours()] == [
        "0.001",
        "0.00178",
        "0.00316",
    ]
    shown = render_markdown(sweep, collect_groups(sweep))
    line = next(line for line in shown.splitlines() if line.startswith("| lora | 0.001: "))
    loss = 1 + math.log10(1.9e-3 / 1.78e-3) ** 2
    assert f"| 0.00178: {loss:.4f}; fresh {loss + 0.002:.4f} ± " in line
    assert line.endswith("| 0.00316: diverged |")

    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure) or path)
    draw_rate_curves([curve], trainer.folder / "rates.png")
    whole, near = figures[0].axes
    assert whole.get_xscale() == near.get_xscale() == "log"
    line, best, diverged = whole.lines
    assert line.get_xdata().tolist() == [3.16e-4, 5.62e-4, 1e-3, 1.78e-3]
    assert best.get_xydata().tolist() == [[1.78e-3, pytest.approx(loss)]]
    assert diverged.get_xdata().tolist() == [3.16e-3]
    assert [text.get_text() for text in near.texts] == ["lora"]
    lines = render_rates_csv(sweep).splitlines()
    assert [line.split(",")[2] for line in lines[1:]] == [
        "0.000316",
        "0.000562",
        "0.001",
        "0.00178",
        "0.00316",
    ]
    assert lines[-1] == "lora,,0.00316,diverged,0,,"


def test_rates_are_drawn_apart_for_each_value_that_varies(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    vary = {"fields": ["adapter.rank"], "values": [2, 4]}
    sweep = trainer.read_table(vary=vary, learning_rates={"grid": [1e-3, 1e-2], "seed": 0})
    for cell, losses in {Cell("lora", 2): [0.5, 0.25], Cell("lora", 4): [50.0, 75.0]}.items():
        for run, loss in zip(sweep.list_tuning_runs(cell).values(), losses, strict=True):
            results = make_results(0.5, scores={}, held_out=make_held_out(loss))
            write_results(sweep, run, results)
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure) or path)
    draw_rate_curves(collect_rate_curves(sweep), trainer.folder / "rates.png")
    panels = {axis.get_title(): axis for axis in figures[0].axes}
    assert list(panels) == [
        "2: every rate",
        "2: around the best",
        "4: every rate",
        "4: around the best",
    ]
    assert panels["2: every rate"].get_ylim()[1] < 1 < 40 < panels["4: every rate"].get_ylim()[0]
    assert panels["4: every rate"].lines[0].get_ydata().tolist() == [50, 75]
    assert [text.get_text() for text in panels["4: around the best"].texts] == ["lora"]

    write_sweep_page(sweep, trainer.folder / "page.html")
    charts = read_page(trainer.folder / "page.html").get_data("charts-data")
    (shown,) = [chart["figures"] for chart in charts if chart["name"] == "rates"]
    assert {value: figure["traces"][0]["y"] for value, figure in shown.items()} == {
        "2": [0.5, 0.25],
        "4": [50, 75],
    }


def test_diverged_fresh_seeds_are_counted_at_their_rate(trainer: Trainer) -> None:
    rates = TABLE["learning_rates"] | {"neighbours": True}
    sweep = trainer.read_table(learning_rates=rates)
    assert trainer.run(sweep, num_slots=3) == 0
    complete = render_rates_csv(sweep)
    assert "fresh_seeds" not in complete
    runs = sweep.list_eval_runs(LORA)
    for run in (runs["below"][0], *runs["above"]):
        (sweep.folder / run.name / "results.json").unlink()
        (sweep.folder / run.name / "state.json").write_text('{"state": "diverged"}')
    below, own, above = map(format_loss, collect_rate_curves(sweep)[0].list_neighbours())
    assert re.fullmatch(r"0.000316: [\d.]+; fresh [\d.]+ ± [\d.]+ \(2 of 3, 1 diverged\)", below)
    assert re.fullmatch(r"0.000562: [\d.]+; fresh [\d.]+ ± [\d.]+", own)
    assert re.fullmatch(r"0.001: [\d.]+; fresh \(0 of 3, 3 diverged\)", above)
    lines = list(csv.DictReader(io.StringIO(render_rates_csv(sweep))))
    assert [line["fresh_seeds"] for line in lines] == [
        "2 of 3, 1 diverged",
        "3",
        "0 of 3, 3 diverged",
    ]
    assert lines[2]["fresh_mean"] == ""


def test_rates_are_named_alike_wherever_they_come_from() -> None:
    steps = range(-24, -5)
    assert [find_step(make_rate(step)) for step in steps] == list(steps)
    assert [f"{make_rate(step):g}" for step in (-24, -23, -13, -12, -6)] == [
        "1e-06",
        "1.78e-06",
        "0.000562",
        "0.001",
        "0.0316",
    ]
    assert make_grid([1.778e-4, 3.162e-4], 0.1) == [1.78e-5, 3.16e-5]
    assert make_grid([1e-4, 3.16e-4, 1e-3], 1) == [1e-4, 3.16e-4, 1e-3]
    assert find_step(2e-5) is None


@pytest.mark.parametrize(
    ("grid", "factor", "message"),
    [
        ([1e-3, 2e-3], 1.0, "grid: 0.002 is not one of the four rates a decade .* is 0.00178"),
        ([1e-3, 3.16e-3, 5.62e-3], 1.0, "grid: 0.00562 does not follow on the rate before it"),
        ([1e-3, 5.62e-4], 1.0, "grid: 0.000562 does not follow"),
        ([1e-3], 0.3, "grid: 0.001 times rate_factor 0.3 is not one of"),
        ([1e-6], 0.1, "grid: 1e-06 times rate_factor 0.1 is not within 1e-06 to 0.0316"),
        ([0.0, 1e-3], 1.0, "learning_rates.grid.0: 0.0 is not valid"),
    ],
)
def test_a_grid_that_cannot_be_extended_is_refused(
    grid: list[float], factor: float, message: str, trainer: Trainer
) -> None:
    rows = {"lora": TABLE["rows"]["lora"] | {"rate_factor": factor}}
    with pytest.raises(UserError, match=message):
        trainer.read_table(learning_rates=TABLE["learning_rates"] | {"grid": grid}, rows=rows)


def test_the_seed_that_chooses_a_rate_does_not_judge_it(trainer: Trainer) -> None:
    with pytest.raises(UserError, match="learning_rates\\.seed: 2 is one of `seeds` too"):
        trainer.read_table(learning_rates=TABLE["learning_rates"] | {"seed": 2})
