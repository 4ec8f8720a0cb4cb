"""Proves which runs a table leads to: their recipes and names, and rates chosen by held-out loss.

Reads every table in recipes/tables. Needs nothing else; takes 30 seconds.
"""

import math
from pathlib import Path

import pytest
import yaml

from launch.runtime.errors import UserError
from launch.sweeps.table import TABLES, Cell, Run, Sweep, read_table
from tests.support.sweeps import make_held_out, make_results, write_results

SHIPPED = sorted(path.stem for path in TABLES.glob("*.yaml") if path.stem != "published")
ASTRA, LORA = Cell("astra", None), Cell("lora", None)
TABLE = {
    "recipe": "quickstart",
    "set": {"data.held_out": 20, "train.max_steps": 5},
    "seeds": [1, 2],
    "learning_rates": {"grid": [1e-3, 1e-2], "seed": 0, "common": 1e-3},
    "suites": ["gsm8k"],
    "rows": {
        "astra": {"set": {"adapter.eigen_select": "largest"}},
        "lora": {"set": {"adapter.method": "lora"}},
    },
}


def read_small_table(folder: Path, *overrides: str, **fields: object) -> Sweep:
    """Read TABLE with other `fields`, from `folder`."""
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(TABLE | fields))
    return read_table(str(path), overrides, folder / "runs")


def finish_run(sweep: Sweep, run: Run, loss: float) -> None:
    """Write the results of a run with this held-out loss."""
    write_results(sweep, run, make_results(0.5, held_out=make_held_out(loss)))


def test_there_are_tables() -> None:
    assert {"maths", "code", "commonsense", "ranks", "reference", "miniature"} <= set(SHIPPED)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_table_leads_to_valid_runs_of_different_names(name: str) -> None:
    sweep = read_table(name)
    runs = []
    for cell in sweep.list_cells():
        runs += sweep.list_runs(cell)
    assert len(runs) >= 2
    assert len({run.name for run in runs}) == len(runs)


def test_settings_are_applied_from_the_table_to_the_command_line_and_rates_last(
    tmp_path: Path,
) -> None:
    sweep = read_small_table(tmp_path, "train.max_steps=7")
    run = sweep.make_run(ASTRA, 0.01, 2, ["gsm8k"])
    train = run.recipe.train
    assert (train.max_steps, train.lr, train.seed, run.recipe.calibration.seed) == (7, 0.01, 2, 2)
    assert run.recipe.adapter.eigen_select == "largest"
    assert run.recipe.data.held_out == 20
    assert run.recipe.eval.suites == ["gsm8k"]
    steps = [word for word in run.arguments if word.startswith("train.max_steps=")]
    assert steps == ["train.max_steps=5", "train.max_steps=7"]  # the later one counts


@pytest.mark.parametrize(
    ("override", "field", "table", "source"),
    [
        ("eval.suites=[]", "eval.suites", {}, "suites"),
        ("eval={limit: 5, suites: [gsm8k]}", "eval.suites", {}, "suites"),
        ("train.lr=3", "train.lr", {}, "learning_rates"),
        (
            "adapter.rank=4",
            "adapter.rank",
            {"vary": {"fields": ["adapter.rank"], "values": [2, 8]}},
            "vary",
        ),
        (
            "calibration.data.limit=9",
            "calibration.data.limit",
            {"vary": {"fields": ["calibration.data"], "values": ["alpaca", "wikitext2"]}},
            "vary",
        ),
    ],
)
def test_an_override_that_no_run_would_have_is_refused(
    override: str, field: str, table: dict, source: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"^--set: {field} follows from `{source}` of the table;"):
        read_small_table(tmp_path, override, **table)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter={rank: 8}", "adapter overrules rows.astra.set: adapter.eigen_select;"),
        ("adapter.method=pissa", "adapter.method overrules rows.lora.set: adapter.method;"),
    ],
)
def test_an_override_that_would_make_runs_alike_is_refused(
    override: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        read_small_table(tmp_path, override, learning_rates=None)
    assert str(error.value).startswith("--set: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "fields", "section"),
    [
        (["calibration={samples: 64}"], {}, "calibration"),
        (["train={max_steps: 9}"], {}, "train"),
        ([], {"set": {"calibration": {"samples": 64}}}, "calibration"),
        ([], {"rows": {"a": {"set": {"train": {"max_steps": 9}}}}}, "train"),
        ([], {"vary": {"fields": ["calibration"], "values": [{"samples": 4}]}}, "calibration"),
        (["calibration={samples: 64}"], {"set": {"calibration.seed": 7}}, "calibration"),
        ([], {"set": {"calibration": {"samples": 4}, "calibration.seed": 7}}, "calibration"),
    ],
)
def test_a_section_that_takes_the_seeds_with_it_is_refused(
    overrides: list[str], fields: dict, section: str, tmp_path: Path
) -> None:
    message = (
        rf"rows\.\w+: {section}: a setting .* replaces the whole section, with the {section}\.seed"
    )
    with pytest.raises(UserError, match=message):
        read_small_table(tmp_path, *overrides, learning_rates=None, **fields)


def test_the_runs_that_choose_a_rate_keep_their_seed(tmp_path: Path) -> None:
    rates = {"grid": [1e-3], "seed": 7, "set": {"calibration": {"samples": 4}}}
    with pytest.raises(UserError, match=r"with the calibration\.seed of each of `seeds`"):
        read_small_table(tmp_path, learning_rates=rates)


def test_a_section_may_be_replaced_where_no_run_loses_its_own(tmp_path: Path) -> None:
    section = "calibration={samples: 64, seed: 7}"
    run = read_small_table(tmp_path, section).make_run(ASTRA, 0.01, 2, [])
    assert (run.recipe.calibration.samples, run.recipe.calibration.seed) == (64, 7)


def test_a_table_without_rates_of_its_own_takes_one_of_the_command_line(tmp_path: Path) -> None:
    sweep = read_small_table(tmp_path, "train.lr=3", learning_rates=None)
    [runs] = sweep.list_eval_runs(LORA).values()
    assert {run.recipe.train.lr for run in runs} == {3}


def test_any_change_of_the_recipe_makes_another_run_and_nothing_else_does(tmp_path: Path) -> None:
    name = read_small_table(tmp_path).make_run(ASTRA, 0.01, 1, []).name
    assert name.startswith("astra-lr0.01-seed1-")
    assert read_small_table(tmp_path).make_run(ASTRA, 0.01, 1, []).name == name
    with_another_seed = read_small_table(tmp_path, seeds=[1, 2, 3])
    assert with_another_seed.make_run(ASTRA, 0.01, 1, []).name == name
    changed = [
        read_small_table(tmp_path).make_run(ASTRA, 0.01, 1, ["gsm8k"]),
        read_small_table(tmp_path).make_run(ASTRA, 0.01, 2, []),
        read_small_table(tmp_path, "calibration.samples=65").make_run(ASTRA, 0.01, 1, []),
        read_small_table(tmp_path, recipe="metamath").make_run(ASTRA, 0.01, 1, []),
        read_small_table(tmp_path).make_run(LORA, 0.01, 1, []),
    ]
    assert len({run.name for run in changed} | {name}) == 6


def test_the_rate_with_the_least_held_out_loss_is_the_rows_own(tmp_path: Path) -> None:
    sweep = read_small_table(tmp_path)
    low, high = sweep.list_tuning_runs(ASTRA).values()
    assert low.recipe.eval.suites == []  # no benchmark score can influence the choice
    assert sweep.choose_rate(ASTRA) is None
    assert list(sweep.list_eval_runs(ASTRA)) == ["common"]
    finish_run(sweep, low, 0.7)
    assert sweep.choose_rate(ASTRA) is None  # the other has not ended
    finish_run(sweep, high, 0.5)
    assert sweep.choose_rate(ASTRA) == 0.01
    assert sweep.choose_rate(LORA) is None
    runs = sweep.list_eval_runs(ASTRA)
    assert [run.recipe.train.lr for run in runs["own"]] == [0.01, 0.01]
    assert [run.recipe.train.seed for run in runs["common"]] == [1, 2]


def test_a_diverged_rate_loses_and_the_common_rate_is_not_run_twice(tmp_path: Path) -> None:
    sweep = read_small_table(tmp_path)
    low, high = sweep.list_tuning_runs(ASTRA).values()
    finish_run(sweep, low, 0.7)
    (sweep.folder / high.name).mkdir()
    (sweep.folder / high.name / "state.json").write_text('{"state": "diverged"}')
    assert sweep.choose_rate(ASTRA) == 1e-3
    runs = sweep.list_eval_runs(ASTRA)
    assert [run.name for run in runs["own"]] == [run.name for run in runs["common"]]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_held_out_loss_that_is_not_finite_is_not_chosen(loss: float, tmp_path: Path) -> None:
    sweep = read_small_table(tmp_path)
    low, high = sweep.list_tuning_runs(ASTRA).values()
    finish_run(sweep, low, loss)  # the first of the grid
    finish_run(sweep, high, 0.7)
    assert sweep.choose_rate(ASTRA) == 1e-2
    for run in sweep.list_tuning_runs(LORA).values():
        finish_run(sweep, run, loss)
    assert sweep.choose_rate(LORA) is None


def test_a_rows_rates_may_be_another_multiple(tmp_path: Path) -> None:
    rows = TABLE["rows"] | {"low": {"rate_factor": 0.1}}
    assert read_small_table(tmp_path, rows=rows).make_rate_grid(Cell("low", None)) == [
        1e-4,
        1e-3,
    ]


def test_every_row_takes_each_varied_value(tmp_path: Path) -> None:
    vary = {"fields": ["adapter.rank", "adapter.alpha"], "values": [2, 4]}
    sweep = read_small_table(tmp_path, learning_rates=None, vary=vary)
    assert sweep.list_cells() == [
        Cell("astra", 2),
        Cell("astra", 4),
        Cell("lora", 2),
        Cell("lora", 4),
    ]
    recipe = sweep.list_eval_runs(Cell("lora", 4))["recipe"][0].recipe
    assert (recipe.adapter.method, recipe.adapter.rank, recipe.adapter.alpha) == ("lora", 4, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sets": {}}, "sets: unknown key; did you mean set?"),
        ({"rows": {"a": {"sett": {}}}}, "rows.a.sett: unknown key; did you mean rows.a.set?"),
        ({"learning_rates": {"grit": [1]}}, "did you mean learning_rates.grid?"),
        ({"seeds": [1, 1]}, "seeds: the same value twice"),
        ({"seeds": [1, -1]}, "rows.astra: calibration.seed: -1 is not valid"),
        (
            {"rows": {"a": {"set": {"adapter.rnk": 3}}}},
            "rows.a: adapter.rnk: unknown key; did you mean adapter.rank?",
        ),
        ({"set": {}}, "data.held_out: learning rates of small are chosen by it"),
        (
            {"set": {"data.held_out": 20, "train.seed": 7}},
            "train.seed: is one of the table's `seeds`",
        ),
        (
            {"learning_rates": {"grid": [1e-3], "seed": 0, "set": {"train.lr": 1}}},
            "learning_rates.set: train.lr follows from `learning_rates` of the table; leave it out",
        ),
        (
            {"set": {"data.held_out": 20, "train.lr": 1e-3}},
            "set: train.lr follows from `learning_rates` of the table; leave it out",
        ),
        (
            {"rows": {"a": {}, "b": {"set": {"train": {"lr": 1e-3, "seed": 1}}}}},
            "rows.b.set: train.lr follows from `learning_rates` of the table; leave it out",
        ),
        (
            {"learning_rates": None, "rows": {"a": {"set": {"eval.suites": ["math"]}}}},
            "rows.a.set: eval.suites follows from `suites` of the table; leave it out",
        ),
        (
            {"set": {"data.held_out": 20, "eval": {"limit": 5, "suites": []}}},
            "set: eval.suites follows from `suites` of the table; leave it out",
        ),
        (
            {"learning_rates": None, "rows": {"a": {"rate_factor": 0.1}}},
            "rows.a.rate_factor: 0.1 is for the grid of learning_rates, which is not set",
        ),
        (
            {"learning_rates": {"grid": [1e-3], "seed": 0, "set": {"train.seed": 1}}},
            "train.seed: is one of the table's `seeds`",
        ),
        (
            {"vary": {"fields": ["train.lr"], "values": [1e-3, 1e-2]}},
            "vary: train.lr follows from `learning_rates` of the table; leave it out",
        ),
        (
            {"vary": {"fields": ["train"], "values": [{"seed": 1}, {"lr": 1e-3}]}},
            "vary: train.lr follows from `learning_rates` of the table; leave it out",
        ),
        (
            {"vary": {"fields": ["adapter"], "values": [{"rank": 2}, {"rank": 4}]}},
            "vary.fields: adapter overrules rows.astra.set: adapter.eigen_select;",
        ),
        (
            {"learning_rates": {"grid": [1e-3], "seed": 0, "set": {"adapter.method": "lora"}}},
            "learning_rates.set: adapter.method overrules rows.lora.set: adapter.method;",
        ),
        ({"extends": "mathz"}, "no table or file 'mathz'; did you mean maths?"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(fields: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_small_table(tmp_path, **fields)
    assert message in str(error.value)


def test_a_table_may_extend_another_but_not_itself(tmp_path: Path) -> None:
    (tmp_path / "child.yaml").write_text(f"extends: {tmp_path / 'small.yaml'}\nseeds: [7]\n")
    read_small_table(tmp_path)
    child = read_table(str(tmp_path / "child.yaml"))
    assert child.table.seeds == [7]
    assert list(child.table.rows) == ["astra", "lora"]
    with pytest.raises(UserError, match="extends itself"):
        read_small_table(tmp_path, extends=str(tmp_path / "child.yaml"))


def test_the_runs_that_choose_a_rate_have_settings_of_their_own(tmp_path: Path) -> None:
    rates = {"grid": [1e-3, 1e-2], "seed": 0, "common": 1e-3, "set": {"data.limit": 50}}
    sweep = read_small_table(tmp_path, "data.limit=90", learning_rates=rates)
    assert {run.recipe.data.limit for run in sweep.list_tuning_runs(LORA).values()} == {50}
    [common] = sweep.list_eval_runs(LORA).values()
    assert {run.recipe.data.limit for run in common} == {90}
    # the same rate and seed with other settings is another run
    assert len({run.name for run in sweep.list_runs(LORA)}) == 4


def test_a_section_of_the_runs_that_choose_leaves_them_their_rate(tmp_path: Path) -> None:
    rates = {"grid": [1e-3, 1e-2], "seed": 0, "set": {"train": {"max_steps": 3, "seed": 0}}}
    runs = read_small_table(tmp_path, learning_rates=rates).list_tuning_runs(LORA)
    assert [run.recipe.train.lr for run in runs.values()] == [1e-3, 1e-2]
    assert {run.recipe.train.max_steps for run in runs.values()} == {3}


def test_development_rows_do_not_choose_the_step_of_a_run_that_chooses_a_rate(
    tmp_path: Path,
) -> None:
    fields = {"train.keep_best": "mrpc", "data.held_out": 20}
    rates = {"grid": [1e-3], "seed": 0}
    with pytest.raises(UserError, match=r"train\.keep_best: mrpc would choose the step of a run"):
        read_small_table(tmp_path, recipe="glue", set=fields, suites=[], learning_rates=rates)
    rates["set"] = {"task.dev": None, "train.keep_best": None}
    read_small_table(tmp_path, recipe="glue", set=fields, suites=[], learning_rates=rates)


def test_a_wrong_setting_of_the_runs_that_choose_is_refused_before_a_run(tmp_path: Path) -> None:
    rates = {"grid": [1e-3], "seed": 0, "set": {"data.limitt": 50}}
    with pytest.raises(UserError, match=r"^rows\.astra: data\.limitt: unknown key; did you mean"):
        read_small_table(tmp_path, learning_rates=rates)
