"""Proves that tables have scores of development rows, the last epoch's and the best's apart.

Needs nothing; takes 3 seconds.
"""

import json
from pathlib import Path

from launch.pages.sweep import write_sweep_page
from launch.sweeps.blocks import build_blocks
from launch.sweeps.figures import draw_figures
from launch.sweeps.render import list_notes, render_csv, render_markdown
from launch.sweeps.summary import collect_groups
from launch.sweeps.table import Cell, Sweep
from tests.support.html_pages import read_page
from tests.support.sweeps import make_results, make_sweep, make_task_score, write_results

TASKS = {"mrpc": ("accuracy", "f1"), "cola": ("matthews",)}
ROWS = {
    "lora": {"set": {"adapter.method": "lora"}},
    "astra": {"set": {"adapter.method": "astra"}},
}


def make_glue_sweep(folder: Path) -> Sweep:
    """Make a sweep of two rows and two tasks: lora has finished, astra only seed 1 of mrpc."""
    nothing = [None, None, None]
    sweep = make_sweep(
        folder,
        {Cell(label, task): nothing for label in ROWS for task in TASKS},
        recipe="glue",
        rows=ROWS,
        suites=[],
        vary={"fields": ["task.name"], "values": list(TASKS)},
    )
    for label, task in ((label, task) for label in ROWS for task in TASKS):
        runs = sweep.list_eval_runs(Cell(label, task))["recipe"]
        for seed, run in enumerate(runs, start=1):
            if label == "astra" and (task, seed) != ("mrpc", 1):
                continue
            last = {metric: 0.7 + 0.01 * seed**2 for metric in TASKS[task]}
            best = {metric: value + 0.1 for metric, value in last.items()}
            results = make_results(0.5, scores={task: make_task_score(last, best)})
            write_results(sweep, run, results)
            line = json.dumps({"step": 1, "loss": 0.5, "grad_norm": 0.1})
            (sweep.folder / run.name / "metrics.jsonl").write_text(line + "\n")
    return sweep


def test_a_block_has_the_metrics_of_its_task_alone(tmp_path: Path) -> None:
    sweep = make_glue_sweep(tmp_path)
    blocks = build_blocks(sweep, collect_groups(sweep))
    titles = {heading: [entry.text for entry in rows[0]] for heading, rows in blocks.items()}
    [mrpc, cola] = titles
    assert (mrpc[:16], cola[:16]) == ("Task.name = mrpc", "Task.name = cola")
    assert titles[mrpc][3:7] == [
        "mrpc accuracy, last epoch (%)",
        "mrpc f1, last epoch (%)",
        "mrpc accuracy, best epoch (%)",
        "mrpc f1, best epoch (%)",
    ]
    assert titles[cola][3:5] == [
        "cola matthews, last epoch (%)",
        "cola matthews, best epoch (%)",
    ]


def test_means_intervals_and_medians_are_of_one_kind_of_epoch(tmp_path: Path) -> None:
    sweep = make_glue_sweep(tmp_path)
    groups = collect_groups(sweep)
    [mrpc, cola] = build_blocks(sweep, groups).values()
    # The rows are in alphabetical order: astra, lora.
    # 71, 74 and 79: mean 74.67, t(0.975, 2) = 4.303 times 4.041 / sqrt(3), median 74
    assert mrpc[2][3].text == "74.7 ± 10.0, median 74.0"
    assert mrpc[2][5].text == "84.7 ± 10.0, median 84.0"
    assert mrpc[1][3].text == "71.0"  # one seed has neither
    assert cola[1][3].text == ""  # not run
    assert "mrpc: n = 200" in "\n".join(list_notes(sweep, groups))
    assert "| astra | 0.0005 | 1 of 3 | 71.0 |" in render_markdown(sweep, groups)
    assert 'lora,mrpc,recipe,0.0005,"mrpc f1, best epoch (%)",84.66' in render_csv(sweep, groups)


def test_models_that_predict_one_label_are_named(tmp_path: Path) -> None:
    sweep = make_glue_sweep(tmp_path)
    assert "the same" not in " ".join(list_notes(sweep, collect_groups(sweep)))
    for label, task, seed in (("lora", "mrpc", 1), ("lora", "mrpc", 3), ("astra", "mrpc", 1)):
        run = sweep.list_eval_runs(Cell(label, task))["recipe"][seed - 1]
        values = {"accuracy": 0.68, "f1": 0.81}
        score = make_task_score(values, values)
        score["last"] |= {"constant": "predictions"}
        score |= {"most_frequent": 0.68}
        write_results(sweep, run, make_results(0.5, scores={task: score}))
    notes = list_notes(sweep, collect_groups(sweep))
    expected = (
        "All predictions of the last epoch are the same: astra mrpc, seed 1; lora mrpc, seeds 1, 3."
    )
    assert expected in notes
    assert "mrpc: n = 200, 68.0 % of them with the most frequent label; 2 x cpu" in "\n".join(notes)
    assert "\n".join(notes).count("mrpc: n = ") == 1  # other runs of mrpc do not know that share


def test_each_tasks_scores_are_drawn_apart(tmp_path: Path) -> None:
    sweep = make_glue_sweep(tmp_path)
    paths = draw_figures(sweep, collect_groups(sweep), tmp_path)
    assert {path.name for path in paths} == {
        "t_loss.png",
        "t_grad_norm.png",
        "t_mrpc_accuracy_last_epoch.png",
        "t_mrpc_f1_last_epoch.png",
        "t_cola_matthews_last_epoch.png",
    }
    write_sweep_page(sweep, tmp_path / "page.html")
    charts = read_page(tmp_path / "page.html").get_data("charts-data")
    (figures,) = [chart["figures"] for chart in charts if chart["name"] == "scores"]
    assert list(figures) == [  # not the losses, which are different numbers
        "mrpc accuracy, last epoch (%)",
        "mrpc f1, last epoch (%)",
        "cola matthews, last epoch (%)",
        "mrpc accuracy, best epoch (%)",
        "mrpc f1, best epoch (%)",
        "cola matthews, best epoch (%)",
    ]
    (trace,) = figures["cola matthews, last epoch (%)"]["traces"]
    assert trace["y"] == ["lora"]  # a row of points for each row, no line over the tasks
