"""Proves the statistics of a table, by hand and by SciPy, and which runs are refused side by side.

Needs nothing; takes 10 seconds.
"""

from pathlib import Path

import pytest
import yaml
from scipy import stats

from launch.runtime.errors import UserError
from launch.sweeps.summary import (
    collect_groups,
    estimate_mean,
)
from launch.sweeps.table import read_table
from tests.support.sweeps import (
    TABLE,
    make_data,
    make_results,
    make_score,
    make_sweep,
    write_results,
)


def test_interval_of_a_mean() -> None:
    values = [0.51, 0.62, 0.55]
    low, high = stats.t.interval(0.95, 2, loc=0.56, scale=stats.sem(values))
    point = estimate_mean(values)
    assert (point.mean - point.half, point.mean + point.half) == pytest.approx((low, high))
    # By hand: s = 0.0556776, t(0.975, 2) = 4.302653, so half of it is 4.302653 s / sqrt(3).
    assert point.half == pytest.approx(4.302653 * 0.0556776 / 3**0.5, rel=1e-5)
    assert estimate_mean([0.5]) == (0.5, None)
    assert estimate_mean([]) is None


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (
            {"base": {"name": "m", "weights_sha256": "other"}},
            "content of model.name meta-llama/Llama-2-7b-hf",
        ),
        ({"data": make_data("other")}, "content of data.path meta-math/MetaMathQA"),
        ({"dtype": "bfloat16"}, "dtype"),
        (
            {"other_text_source": {"path": "o", "sha256": "other"}},
            "content of eval.other_text o.txt",
        ),
        ({"scores": {"gsm8k": make_score(0.3, data_sha256="other")}}, "content of benchmark gsm8k"),
    ],
)
def test_runs_made_with_other_inputs_are_not_mixed(other: dict, name: str, tmp_path: Path) -> None:
    scores = {"a_1": [0.2, 0.2, 0.2], "b": [0.3, 0.3, 0.3], "c": [None] * 3}
    sweep = make_sweep(tmp_path, scores, set={"eval.other_text": "o.txt"})
    collect_groups(sweep)
    run = sweep.list_eval_runs(sweep.list_cells()[1])["recipe"][0]
    write_results(sweep, run, make_results(0.3) | other)
    with pytest.raises(UserError, match=f"{run.name} was made with another {name} than "):
        collect_groups(sweep)


def test_runs_calibrated_on_other_content_are_not_mixed(tmp_path: Path) -> None:
    rows = {
        name: {"set": {"adapter.eigen_select": name, "calibration.data": "alpaca"}}
        for name in ("smallest", "largest")
    }
    sweep = make_sweep(tmp_path, {name: [0.2] * 3 for name in rows}, rows=rows)
    for number, cell in enumerate(sweep.list_cells()):
        data = {"path": "p", "tokens_sha256": f"content {number}", "examples": 2, "tokens": 9}
        for run in sweep.list_eval_runs(cell)["recipe"]:
            write_results(sweep, run, make_results(0.2) | {"calibration_data": data})
    message = "another content of calibration.data yahma/alpaca-cleaned than "
    with pytest.raises(UserError, match=message):
        collect_groups(sweep)


def test_runs_scored_on_other_development_rows_are_not_mixed(tmp_path: Path) -> None:
    """As after labels in dev.jsonl were corrected between two seeds."""
    rows = {"lora": {"set": {"adapter.method": "lora"}}}
    fields = {"recipe": "glue", "suites": [], "set": {"task.dev": "dev.jsonl"}}
    sweep = make_sweep(tmp_path, {"lora": [None] * 3}, rows=rows, **fields)
    runs = sweep.list_eval_runs(sweep.list_cells()[0])["recipe"]
    for run, content in zip(runs, ("old", "old", "new"), strict=True):
        collect_groups(sweep)
        dev = {"mrpc": {"tokens_sha256": content, "kept": 9, "cut": 0}}
        data = make_data() | {"dev": dev}
        write_results(sweep, run, make_results(0.2, scores={}, data=data))
    with pytest.raises(UserError, match=r"another content of task\.dev mrpc than "):
        collect_groups(sweep)


@pytest.mark.parametrize(
    "missing",
    [{"other_text_source": None}, {"scores": {"gsm8k": make_score(0.3, data_sha256=None)}}],
    ids=["other_text_source", "data_sha256"],
)
def test_an_input_that_a_run_does_not_know_is_not_compared(missing: dict, tmp_path: Path) -> None:
    scores = {"a_1": [0.2, 0.2, 0.2], "b": [0.3, 0.3, 0.3], "c": [None] * 3}
    sweep = make_sweep(tmp_path, scores, set={"eval.other_text": "o.txt"})
    run = sweep.list_eval_runs(sweep.list_cells()[1])["recipe"][0]
    write_results(sweep, run, make_results(0.3) | missing)
    assert [len(group.results) for group in collect_groups(sweep)] == [3, 3, 0]


def test_runs_that_choose_a_rate_are_made_with_the_same_inputs(tmp_path: Path) -> None:
    rates = {"grid": [1e-5, 1e-4], "seed": 0, "common": 1e-5}
    table = TABLE | {"learning_rates": rates, "set": {"data.held_out": 9}}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(table))
    sweep = read_table(str(tmp_path / "t.yaml"), (), tmp_path / "runs")
    first, second = sweep.list_tuning_runs(sweep.list_cells()[0]).values()
    write_results(sweep, first, make_results(0.2, scores={}))
    collect_groups(sweep)
    write_results(sweep, second, make_results(0.2, scores={}, dtype="bfloat16"))
    message = f"{second.name} was made with another dtype than .*{first.name}"
    with pytest.raises(UserError, match=message):
        collect_groups(sweep)


@pytest.mark.parametrize(
    "field",
    [
        "model.name: p",
        "model.revision: p",
        "data.limit: 7",
        "data.max_length: 7",
        "data.filter: {type: p}",
        "data.chat_template: p",
        "task.sentence2: p",
        "task.label: p",
    ],
)
def test_rows_on_other_models_or_data_have_other_tokens(field: str, tmp_path: Path) -> None:
    table = {"suites": []}
    if field.startswith("data.chat_template"):
        table["set"] = {"data.messages": "m"}
    if field.startswith("task."):
        task = {"task.name": "t", "task.kind": "regression", "task.sentence1": "s"}
        table |= {"recipe": "glue", "set": task}
    rows = {"a": {}, "b": {"set": yaml.safe_load(field)}}
    scores = {"a": [0.2, 0.2, 0.2], "b": [None] * 3}
    sweep = make_sweep(tmp_path, scores, rows=rows, **table)
    for run in sweep.list_eval_runs(sweep.list_cells()[1])["recipe"]:
        write_results(sweep, run, make_results(0.3, data=make_data("of b")))
    assert [len(group.results) for group in collect_groups(sweep)] == [3, 3]
