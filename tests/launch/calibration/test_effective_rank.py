"""calibrate.py --after refuses a run whose base or rows are others now, and decides what it leaves open.

Nothing is computed: a model that cannot be estimated has no limit of memory.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from launch import calibrate
from launch.calibration import effective_rank
from launch.calibration.effective_rank import make_measuring_recipe, measure_effective_ranks
from launch.calibration.store import MANIFEST
from launch.config.schema import Recipe
from launch.data import inputs as data_inputs
from launch.planning import budget
from launch.runtime import distributed
from launch.runtime.distributed import start_process_group, stop_process_group
from launch.runtime.errors import UserError
from tests.support.paths import FIXTURES


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    start_process_group()
    yield
    stop_process_group()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of an earlier version, with the config's hash."""
    folder = Path(shutil.copytree(FIXTURES / "before" / "run", tmp_path / "run"))
    results = json.loads((folder / "results.json").read_text())
    results["base"]["config_sha256"] = "c"
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def measured(run: Path, monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Let calibrate.py --after stop where it would measure `run`; the recipes that got there."""
    recipes = []

    def refuse_estimate(*_: object) -> None:
        raise NotImplementedError("no estimate")

    inputs = SimpleNamespace(
        model_path=None,
        dtype=torch.float32,
        head=None,
        model=SimpleNamespace(head_parameters=()),
        data={"dropped": {}},
        calibration=SimpleNamespace(tokens=range(40)),
    )
    monkeypatch.setattr(distributed, "start_process_group", lambda _: torch.device("cpu"))
    monkeypatch.setattr(distributed, "stop_process_group", lambda: None)
    monkeypatch.setattr(data_inputs, "prepare_inputs", lambda *_: inputs)
    monkeypatch.setattr(budget, "read_config", lambda *_, **__: None)
    monkeypatch.setattr(budget, "estimate_calibration_needs", refuse_estimate)
    monkeypatch.setattr(
        effective_rank, "measure_effective_ranks", lambda _, recipe, *__: recipes.append(recipe)
    )
    monkeypatch.setattr(sys, "argv", ["calibrate.py", "--after", str(run)])
    return recipes


def set_calibration(run: Path, **fields: object) -> None:
    """Change fields of the calibration in a run's recipe."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["calibration"] |= fields
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.mark.parametrize(
    ("part", "key", "message"),
    [
        ("base", "weights_sha256", "the weights of model.name"),
        ("base", "config_sha256", "config.json of model.name"),
        ("data", "tokens_sha256", "the rows of data.path"),
    ],
)
def test_another_base_or_other_rows_are_refused(
    part: str, key: str, message: str, run: Path
) -> None:
    results = json.loads((run / "results.json").read_text())
    changed = results[part] | {key: "other"}
    inputs = SimpleNamespace(
        **({name: results[name] for name in ("base", "data")} | {part: changed})
    )
    recipe = make_measuring_recipe(run, None)
    with pytest.raises(UserError, match=f"--after: {message} changed since"):
        measure_effective_ranks(run, recipe, inputs, torch.device("cpu"))
    assert not (run / "after").exists()


def test_a_base_that_is_not_whole_has_no_before(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["new_weights"] = ["lm_head.weight"]
    recipe["adapter"] = {"method": "full"}
    del recipe["calibration"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=r"--after: .* drew lm_head\.weight \(model\.new_weights"):
        make_measuring_recipe(run, None)


def test_a_run_that_kept_its_best_step_is_measured_too(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["held_out"] = 4
    recipe["eval"] |= {"every": 2}
    recipe["train"] |= {"keep_best": "held_out", "patience": 2}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert make_measuring_recipe(run, None).train.keep_best is None


@pytest.mark.parametrize(
    ("finished", "limit"),
    [([], None), (["before"], None), (["before", "after"], "auto")],
    ids=["none", "before", "both"],
)
def test_memory_is_decided_for_the_calibration_that_is_made_next(
    finished: list[str], limit: object, run: Path, measured: list[Recipe]
) -> None:
    set_calibration(run, memory_gib="auto")
    for when in finished:
        (run / "after" / when).mkdir(parents=True)
        (run / "after" / when / MANIFEST).write_text(json.dumps({"conditions": {"memory_gib": 1}}))
    calibrate.main()
    assert [recipe.calibration.memory_gib for recipe in measured] == [limit]


@pytest.mark.parametrize(("samples", "num_measured"), [(40, 40), (41, 40)])
def test_a_run_of_fewer_rows_than_samples_is_measured_on_all(
    samples: int,
    num_measured: int,
    run: Path,
    measured: list[Recipe],
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_calibration(run, samples=samples)
    calibrate.main()
    assert [recipe.calibration.samples for recipe in measured] == [num_measured]
    line = (
        "calibration.samples: 41 is above the 40 examples that there are; all of them are measured"
    )
    assert capsys.readouterr().out.splitlines().count(line) == (samples > num_measured)
