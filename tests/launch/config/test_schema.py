"""Every recipe parses, what it holds is what method.md says, and a wrong one is refused with the remedy."""

from pathlib import Path

import pytest
import yaml

from launch.config.schema import RECIPES, Recipe, Section, field_help, read, to_yaml, validate
from launch.runtime.errors import UserError

ALL = sorted(RECIPES.glob("*.yaml"))  # tables are in test_tables.py


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_recipe_parses_by_name_and_survives_the_round_trip(
    path: Path, tmp_path: Path
) -> None:
    recipe = read(path.stem, [])
    copy = tmp_path / "recipe.yaml"
    copy.write_text(to_yaml(recipe))
    assert read(str(copy), []) == recipe
    assert to_yaml(read(str(copy), [])) == copy.read_text()


def test_the_recipes_are_all_there_with_a_run_script_each() -> None:
    names = [path.stem for path in ALL]
    assert names == ["codefeedback", "commonsense", "metamath", "quickstart"]
    for name in names:
        script = RECIPES / f"{name}.sh"
        assert script.stat().st_mode & 0o111, script
        assert f"--recipe {name}" in script.read_text()


@pytest.mark.parametrize(
    ("name", "samples"), [("metamath", 256), ("codefeedback", 256), ("commonsense", 64)]
)
def test_the_published_settings(name: str, samples: int) -> None:
    recipe = read(name, [])
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


def test_overrides_are_yaml_values_and_the_last_one_counts() -> None:
    recipe = read(
        "metamath",
        [
            "train.lr=1e-4",
            "train.lr=3e-4",
            "adapter.targets=[q_proj, v_proj]",
            "train.max_steps=5",
            "engine=zero2",
        ],
    )
    assert recipe.train.lr == 3e-4
    assert recipe.adapter.targets == ["q_proj", "v_proj"]
    assert (recipe.train.max_steps, recipe.engine) == (5, "zero2")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "adapter.eigenselect=largest",
            "adapter.eigenselect: unknown key; did you mean adapter.eigen_select?",
        ),
        ("zzz=1", "zzz: unknown key; known: model, data"),
        ("train.lr=-1", "train.lr: -1 is not valid"),
        ("train.lr=true", "train.lr: True is not valid"),
        ("train.max_steps='7'", "train.max_steps: '7' is not valid"),
        (
            "adapter.eigen_select=tail",
            "adapter.eigen_select: 'tail' is not valid: Input should be 'smallest'",
        ),
        (
            "adapter={method: lora, rank_allocation: effective_rank}",
            "adapter.rank_allocation: effective_rank needs method astra",
        ),
        ("adapter={method: pissa, eigen_select: largest}", "adapter.eigen_select: pissa has none"),
        ("adapter.corda_mode=kpm", "adapter.corda_mode: astra has none"),
        (
            "calibration={statistics: reference, batch_size: 2}",
            "calibration.batch_size: the reference statistics",
        ),
        ("eval.samples=3", "eval.samples: above 1 they need a temperature above 0"),
        ("eval.suites=[glue]", "eval.suites.0: 'glue' is not valid"),
        ("model=7", "model: 7 is not valid"),
        ("engine.x=1", "--set: engine.x: engine has no fields of its own"),
        ("train.lr", "--set: 'train.lr' is not of the form a.b=value"),
        ("train.lr=[", "--set: the value of 'train.lr=[' is not YAML"),
    ],
)
def test_a_wrong_override_is_named_with_the_remedy(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read("metamath", ["engine=zero3", override])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting", ["statistics=reference", "split_half=true"])
def test_what_only_astras_calibration_has_is_refused_elsewhere(setting: str) -> None:
    with pytest.raises(
        UserError,
        match=rf"^calibration\.{setting.split('=')[0]}: eva has no use for it, only astra",
    ):
        read("metamath", ["adapter.method=eva", f"calibration.{setting}"])


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not YAML"), ("", "holds no fields"), ("[1]", "holds no")]
)
def test_a_file_that_is_no_recipe_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read(str(path), [])


def test_a_missing_field_is_named() -> None:
    with pytest.raises(UserError, match=r"data\.path: is required"):
        validate({"model": {"name": "x"}, "data": {}})


def test_every_field_is_described_in_the_help() -> None:
    text = field_help()
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            for key, spec in field.annotation.model_fields.items():
                assert f"  {name}.{key} " in text
                assert spec.description
        else:
            assert f"  {name} " in text
    assert yaml.safe_load(to_yaml(read("quickstart", [])))["engine"] == "zero3"
