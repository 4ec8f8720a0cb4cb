"""Change a base's config.json, whose weights stay: every command that took it before says so.

One rank; about 20 s.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import make_set_options
from tests.support.runs import read_results

pytestmark = pytest.mark.full


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_changed_config_is_another_base(
    launch: Callable, recipe: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    model, run, scores = (tmp_path / name for name in ("model", "run", "scores"))
    shutil.copytree(base, model)
    settings = [f"model.name={model}", "train.max_steps=2", "eval.suites=[]", "engine=single"]
    train = ["launch/train.py", "--recipe", recipe, *make_set_options(settings), "--output", run]
    score = ["launch/evaluate.py", "--model", model, "--suite", "gsm8k", "--data-dir", data]
    score += ["--engine", "single", "--max-new-tokens", 4, "--output", scores]
    adapter = [*score, "--adapter", run / "lora"]
    launch(*train)
    launch(*adapter)
    change_json(run / "lora" / "adapter_config.json", lora_alpha=1000)
    assert "is generations.previous.jsonl now" in launch(*adapter).stdout
    assert "is generations.previous-2.jsonl now" in launch(*score).stdout

    change_json(model / "config.json", transformers_version="9.9", use_cache=False)
    assert "was made with other settings" not in launch(*score).stdout
    change_json(model / "config.json", rms_norm_eps=0.5)
    # No response is deleted: the earlier files keep their names.
    assert "is generations.previous-3.jsonl now" in launch(*score).stdout
    refusals = {
        "--adapter: ": adapter,
        "--after: config.json of model.name changed": ["launch/calibrate.py", "--after", run],
    }
    for message, line in refusals.items():
        done = launch(*line, check=False)
        assert (done.returncode, f"error: {message}" in done.stderr) == (2, True), done.stderr
    assert "config_sha256" in read_results(run)["base"]
    (run / "results.json").unlink()
    done = launch(*train, check=False)
    assert done.returncode == 2
    assert "error: config.json of model.name: its content is not what this run" in done.stderr
