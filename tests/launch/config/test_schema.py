"""Every shipped recipe is valid and has the published settings, and --help describes every field.

Needs nothing. Takes 2 s.
"""

import re
from pathlib import Path

import pytest

from launch.config.help import render_field_help
from launch.config.loading import RECIPES, dump_recipe, read_recipe
from launch.config.schema import Recipe, Section
from launch.runtime.errors import UserError

ALL = sorted(RECIPES.glob("*.yaml"))  # for tables see tests/launch/sweeps/test_table.py


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_recipe_parses_by_name_and_survives_the_round_trip(
    path: Path, tmp_path: Path
) -> None:
    recipe = read_recipe(path.stem, [])
    copy = tmp_path / "recipe.yaml"
    copy.write_text(dump_recipe(recipe))
    assert read_recipe(str(copy), []) == recipe
    assert dump_recipe(read_recipe(str(copy), [])) == copy.read_text()


def test_the_recipes_are_all_there_with_a_run_script_each() -> None:
    names = [path.stem for path in ALL]
    assert names == [
        "codefeedback",
        "commonsense",
        "glue",
        "glue_adalora",
        "glue_lora",
        "metamath",
        "quickstart",
        "smollm2",
    ]
    for name in names:
        script = RECIPES / f"{name}.sh"
        assert script.stat().st_mode & 0o111, script
        assert f"--recipe {name}" in script.read_text()


@pytest.mark.parametrize(
    ("name", "samples"), [("metamath", 256), ("codefeedback", 256), ("commonsense", 64)]
)
def test_the_published_settings(name: str, samples: int) -> None:
    recipe = read_recipe(name, [])
    assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.dropout) == (128, 128, 0)
    assert (recipe.train.lr, recipe.train.warmup_ratio, recipe.train.weight_decay) == (
        2e-5,
        0.03,
        0,
    )
    assert (recipe.train.global_batch, recipe.train.epochs, recipe.data.limit) == (128, 1, 100_000)
    assert (recipe.data.max_length, recipe.calibration.samples) == (512, samples)
    assert (recipe.adapter.method, recipe.adapter.eigen_select, recipe.engine) == (
        "astra",
        "smallest",
        "zero3",
    )
    assert len(recipe.adapter.targets) == 7


@pytest.mark.parametrize("setting", ["statistics=reference", "split_half=true"])
def test_what_only_astras_calibration_has_is_refused_elsewhere(setting: str) -> None:
    with pytest.raises(
        UserError,
        match=rf"^calibration\.{setting.split('=')[0]}: eva has no use for it, only astra",
    ):
        read_recipe("metamath", ["adapter.method=eva", f"calibration.{setting}"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["adapter.rank=4", "export.rank=9"], r"export\.rank: 9 is above 8, the rank of lora/"),
        (
            ["adapter.rank=4", "adapter.method=lora", "export.rank=5"],
            r"export\.rank: 5 is above 4, the rank of lora/",
        ),
        (["adapter.method=dora", "export.rank=4"], r"export\.rank: no plain LoRA equals dora"),
        (["adapter.method=full", "export.rank=4"], r"export\.rank: method full writes the whole"),
        (
            ["adapter.method=full", "export.merged=true"],
            r"export\.merged: method full writes the whole",
        ),
        (["export.rank=0"], r"export\.rank: "),
    ],
)
def test_exports_that_cannot_be_made_are_refused_before_the_run(
    settings: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_recipe("metamath", settings)
    read_recipe("metamath", ["adapter.rank=4", "export.rank=8", "export.merged=true"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["adapter.eigen_select=haar", "calibration.split_half=true"], "calibration.split_half: "),
        (
            ["adapter.eigen_select=haar", "calibration.path=c"],
            "calibration.path: eigen_select haar",
        ),
        (
            ["adapter.eigen_select=haar", "adapter.rank_allocation=effective_rank"],
            "adapter.rank_allocation: ",
        ),
        (["adapter.method=corda", "adapter.start=zero"], "adapter.start: corda has none"),
        (["adapter.start=zero", "adapter.rank=4", "export.rank=5"], "export.rank: 5 is above 4"),
        (["adapter.method=full", "train.lr_ratio=2"], "train.lr_ratio: is B's rate over A's"),
        (["train.lr_ratio=0"], "train.lr_ratio: "),
        (["train.lr_ratio=.inf"], "train.lr_ratio: "),
    ],
)
def test_controls_are_refused_where_they_mean_nothing(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        read_recipe("metamath", settings)


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        (["adapter.eigen_select=haar"], "astra haar"),
        (["adapter.start=zero", "train.lr_ratio=4"], "astra smallest zero start lr_ratio 4"),
        (["adapter.method=lora", "train.lr_ratio=16"], "lora lr_ratio 16"),
        (["adapter.method=lora", "train.lr_ratio=1"], "lora"),
    ],
)
def test_labels_tell_the_controls_apart(settings: list[str], label: str) -> None:
    assert read_recipe("metamath", settings).label == label


def test_a_method_is_told_the_scale_of_its_layers() -> None:
    for method, scaling in (("lora", 1.5), ("rslora", 3.0)):  # alpha / r, alpha / sqrt(r)
        settings = [f"adapter.method={method}", "adapter.rank=4", "adapter.alpha=6"]
        assert read_recipe("metamath", settings).method_settings().scaling == scaling


def test_every_field_is_described_in_the_help() -> None:
    text = render_field_help()
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            for key, spec in field.annotation.model_fields.items():
                assert f"  {name}.{key} " in text
                assert spec.description
        else:
            assert f"  {name} " in text


SCORED = ["data.held_out=8", "eval.every=10"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["eval.every=10"], "eval.every: there is nothing to score; set data.held_out"),
        (["eval.every=0"], "eval.every: "),
        (["eval.every_suites=[gsm8k]"], "eval.every_suites: are scored every `every` steps"),
        ([*SCORED, "eval.every_limit=5"], "eval.every_limit: is for eval.every_suites"),
        (["train.patience=2"], "train.patience: waits for a better score; name it"),
        (
            [*SCORED, "train.keep_best=gsm8k"],
            "gsm8k is not scored while training; choose of held_out",
        ),
        (
            ["data.held_out=8", "train.keep_best=held_out"],
            "held_out is not scored while training; set eval.every",
        ),
        ([*SCORED, "train.keep_best=held_out", "train.patience=0"], "train.patience: "),
    ],
)
def test_scores_while_training_that_cannot_be_made_are_refused(
    settings: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read_recipe("metamath", settings)


def test_scores_while_training_have_settings_of_their_own() -> None:
    suites = ["eval.suites=[math]", "eval.limit=50", "eval.samples=4", "eval.temperature=0.7"]
    every = ["eval.every=10", "eval.every_suites=[commonsense]", "train.keep_best=boolq"]
    recipe = read_recipe("metamath", [*suites, *every])
    settings = recipe.eval.while_training
    assert (settings.suites, settings.limit, settings.samples) == (["commonsense"], 50, 1)
    assert settings.temperature == 0.7
    limited = read_recipe("metamath", [*suites, *every, "eval.every_limit=7"])
    assert limited.eval.while_training.limit == 7
