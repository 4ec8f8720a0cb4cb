"""Files and overrides become a recipe, a wrong one is refused with the remedy, and renamed fields
keep working.

Hashes here were computed by the revision before `data.keep` was renamed: what was stored by it is
found again. Needs nothing. Takes 2 s.
"""

import hashlib
import json
import re
from pathlib import Path

import pytest

from launch.config import loading
from launch.config.loading import (
    dump_for_hash,
    dump_recipe,
    find_difference,
    read_recipe,
    read_stored_recipe,
    validate_recipe,
)
from launch.runtime.errors import UserError

RENAMED = "data.keep is called data.filter now; the old name works for one release"
PATTERNS = {"type": ["GSM_*", "MATH_*"]}


def test_overrides_are_yaml_values_and_the_last_one_counts() -> None:
    recipe = read_recipe(
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
        ("kind=x", "kind: unknown key; "),
        ("train.lr=-1", "train.lr: -1 is not valid"),
        ("train.lr=true", "train.lr: True is not valid"),
        ("train.max_steps='7'", "train.max_steps: '7' is not valid"),
        *[
            (
                f"calibration.memory_gib={value}",
                f"calibration.memory_gib: {shown} is not valid: Input should be a number above 0, "
                "auto or null",
            )
            for value, shown in {
                "0": "0",
                "-1": "-1",
                "true": "True",
                "much": "'much'",
                "[1]": "[1]",
                ".inf": "inf",
                ".nan": "nan",
            }.items()
        ],
        ("calibration.reduction=ranks", "calibration.reduction: 'ranks' is not valid"),
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
        (
            "data.filter={type: a, type: b}",
            "--set: the value of 'data.filter={type: a, type: b}' is not YAML; quote it (type is",
        ),
    ],
)
def test_a_wrong_override_is_named_with_the_remedy(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_recipe("metamath", ["engine=zero3", override])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("", "holds no fields"),
        ("[1]", "holds no"),
        ("train: {lr: 1}\ntrain: {epochs: 3}", "is not YAML: train is there twice; keep one"),
        ("data: {filter: {type: a, type: b}}", "type is there twice"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_recipe(str(path), [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: x", "kind: unknown key; "),
        ("1: x", "1: 1 is not valid: Keys should be strings"),
        ("on: x", "1: True is not valid: Keys should be strings"),  # YAML's on is true
        ("train: {1: x}", "train.1: 1 is not valid: Keys should be strings"),
    ],
)
def test_a_key_that_is_no_field_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: metamath\n{text}\n")
    with pytest.raises(UserError) as error:
        read_recipe(str(path), [])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_inherited_fields_that_messages_lack_can_be_set_as_the_error_says() -> None:
    settings = ["data.messages=messages", "eval.prompt=chat"]
    for field, default in (("instruction", "query"), ("answer", "response"), ("input", "null")):
        message = rf"^data\.{field}: messages have none; .* set it to {default}\)"
        with pytest.raises(UserError, match=message):
            read_recipe("commonsense", settings)
        settings.append(f"data.{field}={default}")
    assert read_recipe("commonsense", settings).data.has_messages


def test_a_missing_field_is_named() -> None:
    with pytest.raises(UserError, match=r"data\.path: is required"):
        validate_recipe({"model": {"name": "x"}, "data": {}})


@pytest.fixture
def _not_yet_announced() -> None:
    loading._announce_new_name.cache_clear()


@pytest.mark.usefixtures("_not_yet_announced")
@pytest.mark.parametrize(
    "overrides",
    [
        [f"data.keep={json.dumps(PATTERNS)}"],
        [f"data.keep.type={json.dumps(PATTERNS['type'])}"],
        [f"data={json.dumps({'path': 'meta-math/MetaMathQA', 'keep': PATTERNS})}"],
    ],
    ids=["field", "inside the field", "section"],
)
def test_the_old_name_works_in_overrides(
    overrides: list[str], capsys: pytest.CaptureFixture
) -> None:
    recipe = read_recipe("metamath", overrides)
    assert recipe.data.filter == PATTERNS
    assert capsys.readouterr().err.splitlines() == [RENAMED]
    read_recipe("metamath", overrides)
    assert capsys.readouterr().err == ""  # said once in a process


@pytest.mark.usefixtures("_not_yet_announced")
def test_the_old_name_works_in_a_file_and_may_be_overridden_by_the_new_one(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {name: m}\ndata: {path: d, keep: {lang: python}, limit: 3}\n")
    assert read_recipe(str(path), []).data.filter == {"lang": "python"}
    assert read_recipe(str(path), ["data.filter={lang: c}"]).data.filter == {"lang": "c"}
    assert read_recipe(str(path), ["data.keep.lang=c"]).data.filter == {"lang": "c"}
    assert capsys.readouterr().err.splitlines() == [RENAMED]


@pytest.mark.usefixtures("_not_yet_announced")
def test_the_new_name_is_announced_on_rank_0_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "1")
    read_recipe("metamath", ["data.keep={type: GSM_*}"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("fields", "overrides"),
    [
        ("keep: {a: b}, filter: {a: b}", []),
        ("filter: {a: b}", ["data.keep={a: b}", "data.filter.a=b"]),
        ("limit: 3", ["data={path: d, keep: {a: b}, filter: {a: b}}"]),
    ],
    ids=["file", "overrides", "section"],
)
def test_both_names_at_once_are_refused(fields: str, overrides: list[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: {{name: m}}\ndata: {{path: d, {fields}}}\n")
    message = "data.keep: is the old name of data.filter, which is given too; leave data.keep out"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        read_recipe(str(path), overrides)


@pytest.mark.parametrize(
    ("name", "overrides", "whole", "tokens"),
    [
        ("metamath", [], "16a2616f2c", "6cadf1cd7d"),
        ("codefeedback", [], "3b3c11bcd5", "10b1003d58"),
        ("commonsense", [], "3287adce8d", "ec489ed2da"),
        ("quickstart", ["train.max_steps=100"], "ea07476ce0", "da067be811"),
        ("metamath", [f"data.filter={json.dumps(PATTERNS)}"], "0018a1f6d0", "e69d90e12a"),
        ("codefeedback", ["data.filter={type: python}"], "641327f9f0", "a6c9d410b2"),
    ],
)
def test_what_is_stored_under_a_hash_is_found_again(
    name: str, overrides: list[str], whole: str, tokens: str
) -> None:
    """A change of a shipped recipe changes these; a renamed field, or a new one, must not."""

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    recipe = read_recipe(name, overrides)
    assert digest(dump_for_hash(recipe)) == whole
    assert digest(json.dumps(recipe.data.token_fields(), sort_keys=True)) == tokens
    others = read_recipe(name, [*overrides, "calibration.reduction=owner"])
    assert digest(dump_for_hash(others)) == whole  # the same numbers, to rounding
    assert "filter" in dump_recipe(recipe)
    assert "filter" not in dump_recipe(recipe, old_names=True)
    small = read_recipe(name, [*overrides, "export.rank=4"])
    assert digest(dump_for_hash(small)) != whole


def test_a_run_on_other_calibration_data_is_found_again() -> None:
    recipe = read_recipe("metamath", ["calibration.data=wikitext2"])
    assert hashlib.sha256(dump_for_hash(recipe).encode()).hexdigest()[:10] == "9bd2c56b01"


@pytest.mark.usefixtures("_not_yet_announced")
def test_a_stored_recipe_is_read_in_silence_and_equals_the_new_one(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = read_recipe("codefeedback", [])
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe, old_names=True))
    assert "  keep:\n    lang: python\n" in path.read_text()
    stored = read_stored_recipe(path)
    assert stored == recipe
    assert find_difference(stored, recipe) is None
    other = read_recipe("codefeedback", ["data.filter={lang: c}"])
    assert find_difference(stored, other) == "data.filter ({lang: python}, now {lang: c})"
    assert capsys.readouterr().err == ""
