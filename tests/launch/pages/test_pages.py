"""Proves what a page of results holds: valid HTML, the numbers of results.json, no text that escapes.

Pages are made of run folders in the fixtures and of made sweeps; test_browser.py opens one. 5 s.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launch.pages.charts import MAX_POINTS, MAX_SHOWN, add_line, make_figure
from launch.pages.generations import MAX_CHARACTERS, MAX_LENGTH, pack_responses
from launch.pages.render import embed_json
from launch.pages.runs import write_runs_page
from launch.pages.sweep import write_sweep_page
from launch.run.metrics import read_metrics
from launch.runtime.errors import UserError
from launch.sweeps.kept import keep_runs
from launch.sweeps.summary import collect_groups, list_columns
from launch.sweeps.table import read_table
from tests.support.html_pages import HtmlPage, read_page
from tests.support.page_runs import make_run, make_running, write_lines
from tests.support.runs import read_generations, read_results
from tests.support.sweeps import (
    TABLE,
    make_held_out,
    make_results,
    make_sweep,
    make_task_score,
    write_results,
)

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!-- <script> -->",
    "<img src=x onerror=alert(1)>",
    "]]> {{ 7 * 7 }} {% raw %} ${alert(1)} &lt;b&gt;",
    "\u2028\u2029\x00\x1b[31m \u202eover",
    "\ud800 half a pair",
]


def get_chart(page: HtmlPage, name: str) -> dict:
    """Return a chart of a page."""
    (chart,) = [chart for chart in page.get_data("charts-data") if chart["name"] == name]
    return chart


def test_every_number_of_a_finished_run_is_that_of_its_results(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_runs_page([run], tmp_path / "page.html")
    page, results = read_page(tmp_path / "page.html"), read_results(run)
    row = page.read_table(0)["run"]
    assert float(row["last loss"][1]) == results["final_loss"]
    assert float(row["lr"][1]) == results["lr"]
    assert [int(row[name][1]) for name in ("rank", "seed", "steps")] == [
        results[name] for name in ("rank", "seed", "steps")
    ]
    assert float(row["calibration (s)"][1]) == results["seconds"]["calibration"]
    assert float(row["training (s)"][1]) == results["seconds"]["training"]
    score = results["scores"]["gsm8k"]
    text, value = row["gsm8k after"]
    assert float(value) == score["accuracy"]
    low, high = (100 * bound for bound in score["interval"])
    assert text == f"{100 * score['accuracy']:.1f} ({low:.1f} to {high:.1f}, n = {score['n']})"

    steps = read_metrics(run)
    (figure,) = get_chart(page, "loss")["figures"].values()
    assert figure["traces"][0]["x"] == [step["step"] for step in steps]
    assert figure["traces"][0]["y"] == pytest.approx([step["loss"] for step in steps], rel=1e-6)
    (figure,) = get_chart(page, "scores")["figures"].values()
    after = figure["traces"][-1]
    assert after["x"][0] + after["error_x"]["array"][0] == pytest.approx(high, rel=1e-6)
    assert after["x"][0] - after["error_x"]["arrayminus"][0] == pytest.approx(low, rel=1e-6)

    conditions = {row[0][0]: row[1][0] for row in page.tables[-1]}
    assert conditions["base weights (SHA-256)"] == results["base"]["weights_sha256"]
    assert conditions["torch"] == results["conditions"]["torch"]
    modules = json.loads((run / "calibration" / "spectrum.json").read_text())["modules"]
    figures = get_chart(page, "effective-rank")["figures"]["run"]
    plotted = [value for trace in figures["traces"] for value in trace["y"]]
    measured = [module["effective_rank"] for module in modules.values()]
    assert sorted(plotted) == pytest.approx(sorted(measured), rel=1e-6)


def test_scores_while_training_are_lines_with_their_responses(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    steps = read_metrics(run)
    losses = {2: 4.5, 4: 4.25, 6: 4.75}
    for step, loss in losses.items():
        steps[step - 1]["dev"] = {"held_out": {"loss": loss}, "gsm8k": {"accuracy": step / 8}}
    write_lines(run / "metrics.jsonl", steps)
    results = read_results(run) | {"exported_step": 4}
    results["held_out"] = {
        when: {"loss": loss, "accuracy": 0.5, "tokens": 9}
        for when, loss in (("before", 5.5), ("after", 4.25))
    }
    (run / "results.json").write_text(json.dumps(results))
    folder = run / "while_training" / "step-0000004"
    folder.mkdir(parents=True)
    write_lines(folder / "generations.jsonl", read_generations(run)[:3])
    write_runs_page([run], tmp_path / "page.html")
    page = read_page(tmp_path / "page.html")
    (figure,) = get_chart(page, "loss")["figures"].values()
    assert (figure["traces"][1]["x"], figure["traces"][1]["y"]) == (
        [0, *losses],
        [5.5, *losses.values()],
    )
    conditions = {row[0][0]: row[1][0] for row in page.tables[-1]}
    assert conditions["exported and scored"].startswith("step 4, the best by")
    figures = get_chart(page, "while-training")["figures"]
    assert list(figures) == ["gsm8k"]
    assert figures["gsm8k"]["traces"][0]["y"] == [0.25, 0.5, 0.75]
    assert "run, after step 4" in json.dumps(page.get_data("generations-data"))


def test_hostile_responses_stay_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<img src=x onerror=alert(1)>", HOSTILE)
    rows = read_generations(run)
    rows[0] |= {"question": HOSTILE[0], "id": HOSTILE[0], "reference": HOSTILE[1]}
    write_lines(run / "generations.jsonl", rows)
    write_runs_page([run], tmp_path / "page.html")
    page = read_page(tmp_path / "page.html")
    packed = page.get_data("generations-data")
    outputs = [problem["responses"][0][2] for problem in packed["problems"]]
    assert outputs[: len(HOSTILE)] == HOSTILE
    # No tag of theirs is one of the page's.
    assert not [tag for tag, attributes in page.tags if tag == "img" or "onerror" in attributes]
    # Two blocks of data, plotly.js and page.js; the last two are all that may run.
    assert len(page.scripts) == 4
    policy = page.get_policy()
    assert re.findall("'sha256-[^']+'", policy) == page.list_script_hashes()
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy and "unsafe-eval" not in policy
    asked = [a for _, attributes in page.tags for a in attributes if a in ("src", "srcset", "data")]
    links = [attributes["href"] for _, attributes in page.tags if "href" in attributes]
    assert not asked and all(link.startswith("#") for link in links)
    targets = {attributes["id"] for _, attributes in page.tags if attributes.get("id")}
    assert {link[1:] for link in links} <= targets


def test_embedded_json_is_what_it_was_and_ends_no_script() -> None:
    text = embed_json({"texts": HOSTILE, "n": [1.5, None, True]})
    assert not set("<>&") & set(text) and text.isascii()
    assert json.loads(text) == {"texts": HOSTILE, "n": [1.5, None, True]}
    with pytest.raises(ValueError, match="JSON"):
        embed_json(float("nan"))


def test_a_running_run_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "done"), make_running(tmp_path / "running")]
    early = tmp_path / "early"
    early.mkdir()
    (early / "recipe.yaml").write_text((runs[0] / "recipe.yaml").read_text())
    (early / "state.json").write_text('{"state": "error", "error": "no <b>disk</b>"}')
    write_runs_page([*runs, early], tmp_path / "page.html")
    page = read_page(tmp_path / "page.html")
    table = page.read_table(0)
    states = {name: row["state"][0] for name, row in table.items()}
    assert states == {"done": "finished", "running": "running", "early": "error"}
    assert table["running"]["steps"] == ("3 of 6", "3")
    assert table["early"]["last loss"] == ("", None)
    assert "early: no &lt;b&gt;disk&lt;/b&gt;" in page.text
    (figure,) = get_chart(page, "loss")["figures"].values()
    assert [len(trace["x"]) for trace in figure["traces"]] == [6, 3]
    # Ungraded responses join the problems of the finished run.
    packed = page.get_data("generations-data")
    assert packed["sources"] == ["done", "running"]
    grades = {tuple(response[3:5]) for response in packed["problems"][0]["responses"][1:]}
    assert grades == {(None, None)}
    # Once it has finished, the same call shows it whole.
    (runs[1] / "results.json").write_text((runs[0] / "results.json").read_text())
    write_runs_page([*runs, early], tmp_path / "page.html")
    assert read_page(tmp_path / "page.html").read_table(0)["running"]["state"][0] == "finished"


def test_scores_of_development_rows_are_shown_with_their_metric(tmp_path: Path) -> None:
    """Of a run with a new head: the last epoch's interval is drawn, where there is one."""
    runs = [make_run(tmp_path / name) for name in ("benchmark", "task", "bare")]
    score = make_task_score({"f1": 0.75}, {"f1": 0.875})
    for run in runs[1:]:
        results = read_results(run)
        results |= {"task": {"kind": "classification", "labels": ["no", "yes"], "pad_token": None}}
        (run / "results.json").write_text(json.dumps(results | {"scores": {"mrpc": score}}))
        score["last"]["intervals"] = None
    score["last"]["intervals"] = {"f1": [0.5, 0.8125]}
    results = read_results(runs[1])
    (runs[1] / "results.json").write_text(json.dumps(results | {"scores": {"mrpc": score}}))
    write_runs_page(runs[1:2], tmp_path / "one.html")
    write_runs_page(runs, tmp_path / "page.html")
    page = read_page(tmp_path / "page.html")
    table = page.read_table(0)
    text = "last epoch 2: f1 0.7500 (0.5000 to 0.8125); best epoch 1: f1 0.8750; n = 200"
    assert table["task"]["mrpc after"] == (text, "0.75")
    assert table["bare"]["mrpc after"][0].startswith("last epoch 2: f1 0.7500; best epoch 1")
    assert table["benchmark"]["mrpc after"] == ("", None)
    for name in ("one", "page"):
        figure = get_chart(read_page(tmp_path / f"{name}.html"), "scores")["figures"]["mrpc"]
        (trace,) = figure["traces"]
        assert (trace["y"], trace["x"], trace["error_x"]["array"]) == (["task"], [75.0], [6.25])
        assert figure["layout"]["xaxis"]["title"]["text"].startswith("f1, last epoch (%)")
    conditions = {row[0][0] for row in page.tables[-1]}
    assert "gsm8k: prompt, grader" in conditions and "mrpc: prompt, grader" not in conditions


def test_the_page_of_a_sweep_shows_scores_of_development_rows(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, {"a_1": [0.2] * 3, "b": [None] * 3, "c": [None] * 3})
    score = make_task_score({"f1": 0.75}, {"f1": 0.875})
    (cell, *_) = sweep.list_cells()
    for run in sweep.list_eval_runs(cell)["recipe"]:
        write_results(sweep, run, make_results(0.2, scores={"mrpc": score}))
    write_sweep_page(sweep, tmp_path / "page.html")
    page = read_page(tmp_path / "page.html")
    assert page.read_table(0)["a_1"]["mrpc f1, last epoch (%)"][1] == "75.0"
    rows = [row for name, row in page.read_table(1).items() if name.startswith("a-1")]
    assert [row["mrpc after"][1] for row in rows] == ["0.75"] * 3


def test_an_unfinished_run_has_its_whole_method_in_the_table(tmp_path: Path) -> None:
    run = make_running(tmp_path / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["adapter"] |= {"method": "corda", "corda_mode": "ipm"}
    recipe["calibration"]["split_half"] = False  # for astra alone
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_runs_page([run], tmp_path / "page.html")
    row = read_page(tmp_path / "page.html").read_table(0)["run"]
    assert (row["state"][0], row["method"][0]) == ("running", "corda ipm")


def test_a_folder_with_a_recipe_alone_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for path in run.iterdir():
        if path.is_file() and path.name != "recipe.yaml":
            path.unlink()
    write_runs_page([run], tmp_path / "page.html")
    assert read_page(tmp_path / "page.html").read_table(0)["run"]["state"][0] == "unfinished"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "recipe.yaml").unlink(), "is not the folder of a run"),
        (lambda run: (run / "recipe.yaml").write_bytes(b"\xff"), "is not the folder of a run"),
        (lambda run: (run / "results.json").write_text("{}"), "is not the folder of a finished"),
        (lambda run: (run / "metrics.jsonl").write_text("{\n{}\n"), "line 1 of .*metrics.jsonl"),
        (lambda run: (run / "generations.jsonl").write_text("[]\n"), "line 1 of .*generations"),
    ],
)
def test_a_damaged_folder_is_named(damage: object, message: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    damage(run)
    with pytest.raises(UserError, match=message):
        write_runs_page([run], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_no_other_file_is_overwritten(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = (run / "results.json").read_bytes()
    (tmp_path / "folder.html").mkdir()
    for path, message in (
        (run / "results.json", "end in .html"),
        (tmp_path / "folder.html", "a folder"),
    ):
        with pytest.raises(UserError, match=message):
            write_runs_page([run], path)
    assert (run / "results.json").read_bytes() == before
    with pytest.raises(UserError, match="given twice"):
        write_runs_page([run, run / ".." / "run"], tmp_path / "page.html")


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / part / "run") for part in ("a", "b")]
    write_runs_page(runs, tmp_path / "page.html")
    assert list(read_page(tmp_path / "page.html").read_table(0)) == list(map(str, runs))


def test_a_page_holds_a_bounded_number_of_characters() -> None:
    row = {"suite": "gsm8k", "sample": 0, "strict": True, "literature": True}
    long = [row | {"id": str(i), "output": "x" * (2 * MAX_LENGTH)} for i in range(3000)]
    packed = pack_responses({"long": long, "short": [row | {"id": "0", "output": "y"}]})
    responses = [
        response for problem in packed.data["problems"] for response in problem["responses"]
    ]
    assert sum(len(response[2]) for response in responses) <= MAX_CHARACTERS
    assert len(responses) == packed.count < len(long)
    assert [response[0] for response in packed.data["problems"][0]["responses"]] == [0, 1]
    # The short source leaves nearly all of its share to the long one.
    assert packed.count > 0.99 * MAX_CHARACTERS / (MAX_LENGTH + 100)
    left_out, cut = packed.notes
    assert left_out.startswith(f"Left out: {len(long) + 1 - packed.count:,} responses of long")
    assert cut.startswith(f"Responses cut after {MAX_LENGTH:,} characters: ")
    assert responses[0][5].startswith("(cut after")


def test_long_curves_are_averaged_and_the_page_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    count = 2 * MAX_POINTS + 1
    steps = [{"step": i, "loss": float(i), "grad_norm": 1.0} for i in range(1, count + 1)]
    write_lines(run / "metrics.jsonl", steps)
    write_runs_page([run], tmp_path / "page.html")
    chart = get_chart(read_page(tmp_path / "page.html"), "loss")
    assert "mean of up to 3 steps" in chart["about"]
    trace = chart["figures"][""]["traces"][0]
    assert trace["y"][:2] == [2.0, 5.0] and len(trace["y"]) <= MAX_POINTS
    assert trace["y"][-1] == pytest.approx(count - 0.5)  # the last point has two steps


def test_no_two_lines_look_alike_and_the_first_are_shown() -> None:
    figure = make_figure("x", "y")
    for number in range(49):
        add_line(figure, str(number), [0], [float("nan")])
    looks = {(line["colour"], line["dash"], line["symbol"]) for line in figure.lines}
    assert len(looks) == 49
    assert [line["shown"] for line in figure.lines].count(True) == MAX_SHOWN
    assert figure.traces[0]["y"] == [None]  # a gap: JSON has no NaN


def test_a_table_has_the_numbers_of_its_runs(tmp_path: Path) -> None:
    scores = {"a_1": [0.2, 0.21, None], "b": [0.8, 0.81, 0.83], "c": [None] * 3}
    sweep = make_sweep(tmp_path, scores)
    write_sweep_page(sweep, tmp_path / "page.html")
    page, groups = read_page(tmp_path / "page.html"), collect_groups(sweep)
    table = page.read_table(0)
    for group in groups:
        for column in list_columns(sweep, groups):
            point = group.estimate_column(column)
            value = table[group.label][column.title][1]
            assert (value and float(value)) == (point and point.mean), column.title
    assert table["c"]["seeds"] == ("0 of 3", "0")
    every = page.read_table(1)
    assert len(every) == 9
    assert sum(row["state"][0] == "finished" for row in every.values()) == 5
    assert "launch/sweep.py --table" in page.text


def test_a_kept_run_has_the_responses_and_spectra_of_its_folder(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, {"a_1": [0.2] * 3, "b": [None] * 3, "c": [None] * 3})
    sweep = replace(sweep, kept=tmp_path / "kept")
    first, *_ = sweep.list_eval_runs(sweep.list_cells()[0])["recipe"]
    made = make_run(tmp_path / "made")
    for name in ("generations.jsonl", "calibration"):
        (made / name).rename(sweep.folder / first.name / name)
    keep_runs(sweep, sweep.list_cells())
    assert sweep.find_folder(first) == sweep.kept / first.name
    write_sweep_page(sweep, tmp_path / "page.html")
    page = read_page(tmp_path / "page.html")
    assert page.get_data("generations-data")["sources"] == ["a_1"]
    assert list(get_chart(page, "effective-rank")["figures"]) == ["a_1"]
    assert page.read_table(1)[first.name]["state"][0] == "finished"


def test_the_chart_of_rates_shows_what_chose_them(tmp_path: Path) -> None:
    rates = {"grid": [1e-4, 2e-4, 4e-4], "seed": 0, "common": 2e-4}
    path = tmp_path / "t.yaml"
    path.write_text(json.dumps(TABLE | {"learning_rates": rates, "set": {"data.held_out": 8}}))
    sweep = read_table(str(path), (), tmp_path / "runs")
    (cell, *_) = sweep.list_cells()
    losses = {1e-4: 0.5, 2e-4: 0.25, 4e-4: float("nan")}
    for rate, run in sweep.list_tuning_runs(cell).items():
        write_results(sweep, run, make_results(0.5, held_out=make_held_out(losses[rate])))
    write_sweep_page(sweep, tmp_path / "page.html")
    chart = get_chart(read_page(tmp_path / "page.html"), "rates")
    (figure,) = chart["figures"].values()
    (trace,) = figure["traces"]
    assert (trace["x"], trace["y"]) == ([1e-4, 2e-4], [0.5, 0.25])
    assert figure["numbers"][1] == [cell.label, "0.0002", "0.25", ""]
