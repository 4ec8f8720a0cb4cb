"""A task of GLUE by its name sets what it decides; a preset has settings by task; recipes extend.

Needs nothing. Takes 3 s.
"""

from pathlib import Path

import pytest
import yaml

from eval.glue import GLUE
from launch.config.loading import RECIPES, dump_recipe, read_recipe
from launch.runtime.errors import UserError


@pytest.mark.parametrize("task", GLUE)
def test_the_name_alone_sets_what_a_task_of_glue_decides(task: str) -> None:
    recipe = read_recipe("glue", [f"task.name={task}"])
    facts = GLUE[task]
    assert (recipe.task.kind, tuple(recipe.task.labels)) == (facts.kind, facts.labels)
    assert (recipe.task.sentence1, recipe.task.sentence2) == (facts.sentence1, facts.sentence2)
    assert (recipe.data.path, recipe.data.config) == ("nyu-mll/glue", task)
    assert set(recipe.task.dev_sets.values()) == set(facts.rows) - {"train"}
    assert set(recipe.task.dev_sets) == ({task} if task != "mnli" else set(facts.dev))


def test_what_is_set_is_left_also_null() -> None:
    own = ["task.name=mrpc", "task.sentence2=null", "task.labels=[bad, good]", "data.config=null"]
    recipe = read_recipe("glue", [*own, "task.dev=dev.jsonl"])
    assert recipe.task.sentence2 is None
    assert recipe.task.labels == ["bad", "good"]
    assert recipe.data.config is None
    assert recipe.task.dev_sets == {"mrpc": "dev.jsonl"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["task.labels=[equivalent, not_equivalent]"],
            r"task\.labels: GLUE's mrpc has them in the order not_equivalent, equivalent",
        ),
        (
            ["task.kind=regression", "task.labels=null"],
            r"task\.kind: GLUE's mrpc is a classification",
        ),
    ],
)
def test_glues_metrics_are_not_used_for_other_labels(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_recipe("glue", ["task.name=mrpc", *settings])


def test_a_task_of_ones_own_has_what_is_set_alone() -> None:
    own = ["task.name=reviews", "task.kind=regression", "task.sentence1=text"]
    recipe = read_recipe("glue", own)
    assert (recipe.task.dev, recipe.data.config) == (None, None)


# Learning rate, epochs, examples a step, longest row: from the scripts that the presets name.
@pytest.mark.parametrize(
    ("preset", "task", "settings"),
    [
        ("glue_lora", "mnli", (5e-4, 30, 128, 512)),
        ("glue_lora", "cola", (4e-4, 80, 256, 512)),
        ("glue_lora", "mrpc", (4e-4, 30, 128, 512)),
        ("glue_lora", "rte", (5e-4, 80, 256, 512)),
        ("glue_adalora", "mnli", (5e-4, 7, 32, 256)),
        ("glue_adalora", "cola", (8e-4, 25, 32, 64)),
        ("glue_adalora", "rte", (1.2e-3, 50, 32, 320)),
    ],
)
def test_presets_have_the_published_settings(preset: str, task: str, settings: tuple) -> None:
    recipe = read_recipe(preset, [f"task.name={task}"])
    train = recipe.train
    assert (train.lr, train.epochs, train.global_batch, recipe.data.max_length) == settings
    assert (recipe.adapter.method, recipe.adapter.rank, recipe.adapter.alpha) == ("lora", 8, 16)


@pytest.mark.parametrize("preset", ["glue_lora", "glue_adalora"])
def test_presets_have_the_eight_tasks_and_every_setting_is_valid(preset: str) -> None:
    by_task = yaml.safe_load((RECIPES / f"{preset}.yaml").read_text())["by_task"]
    assert set(by_task) == set(GLUE) - {"wnli"}
    for task in by_task:
        recipe = read_recipe(preset, [f"task.name={task}", "train.epochs=2"])
        assert recipe.train.epochs == 2  # the command line goes before the preset
        assert recipe.train.lr == by_task[task]["train.lr"]


def test_a_stored_recipe_is_read_as_it_is(tmp_path: Path) -> None:
    stored = tmp_path / "recipe.yaml"
    recipe = read_recipe("glue_lora", ["task.name=cola", "data.config=null"])
    stored.write_text(dump_recipe(recipe))
    assert read_recipe(str(stored), []) == recipe


def test_a_recipe_extends_another_section_by_section(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: metamath\ntrain: {lr: 1.0e-4}\neval: {suites: [gsm8k]}\n")
    base, recipe = read_recipe("metamath", []), read_recipe(str(mine), ["train.seed=7"])
    assert (recipe.train.lr, recipe.train.seed, recipe.eval.suites) == (1e-4, 7, ["gsm8k"])
    assert recipe.train.global_batch == base.train.global_batch
    assert (recipe.model, recipe.data) == (base.model, base.data)


def test_what_an_extending_recipe_sets_goes_before_the_settings_by_task(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: glue_lora\ntask: {name: mrpc}\ntrain: {lr: 0.123}\n")
    recipe = read_recipe(str(mine), [])
    assert (recipe.train.lr, recipe.train.epochs) == (0.123, 30)


def test_settings_by_task_are_extended_task_by_task(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: glue_lora\ntask: {name: cola}\nby_task: {cola: {train.lr: 1.0e-3}}\n")
    train = read_recipe(str(mine), []).train
    assert (train.lr, train.epochs, train.global_batch) == (1e-3, 80, 256)
    other = read_recipe(str(mine), ["task.name=mrpc"]).train
    assert (other.lr, other.epochs) == (4e-4, 30)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("extends: metamth", [], r"--recipe: no recipe or file 'metamth'; did you mean metamath\?"),
        ("extends: {path}", [], r"--recipe: .*mine\.yaml extends itself, through mine"),
        ("extends: glue\nby_task: {mrpc: 3}", [], r"by_task: is not of the form"),
        ("extends: glue\nby_task: {3: {}}", [], r"by_task: is not of the form"),
        ("extends: glue\nby_task: {mrpc: {3: 1}}", [], r"by_task: is not of the form"),
        ("extends: smollm2\ncalibration: {data: {path: [a]}}", [], r"calibration\.data\.path: "),
        (
            "extends: glue\nby_task: {mrpc: {train: {lr: 0.1}}}",
            [],
            r"by_task: mrpc: train is a section; write its fields one by one, such as train\.lr: ",
        ),
        ("extends: glue\nby_task: {cola: {}}", [], r"task\.name: .* for cola, not for mrpc"),
        ("extends: glue\nby_task: {mrpc: {train.lrr: 3}}", [], r"train\.lrr: unknown key; did you"),
        ("extends: glue", ["task.name=sts-b"], r"task\.name: no task 'sts-b' .* mean stsb\?"),
        ("extends: glue", ["task.name=reviews"], r"task\.name: no task .* set task\.kind$"),
        ("extends: glue", ["task.name=3"], r"task\.name: 3 is not valid"),
        ("extends: glue", ["task=3"], r"task: 3 is not valid"),
    ],
)
def test_mistakes_are_named_in_one_line(
    text: str, settings: list[str], message: str, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(text.replace("{path}", str(mine)) + "\n")
    with pytest.raises(UserError, match=rf"^{message}[^\n]*") as error:
        read_recipe(str(mine), settings)
    assert "\n" not in str(error.value)
