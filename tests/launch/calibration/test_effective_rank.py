"""calibrate.py --after refuses a run whose base or rows are others now. Nothing is computed."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from launch.calibration.effective_rank import make_measuring_recipe, measure_effective_ranks
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
