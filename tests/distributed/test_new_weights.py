"""A run that draws weights, cut back to its step 0 and resumed, equals the undisturbed one.

One process, this one. About 5 s.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import pipeline
from launch.config.loading import read_recipe
from tests.support.runs import copy_unfinished, find_newest_step, read_steps

HEAD = "lm_head.weight"
SETTINGS = [
    "engine=single",
    "adapter.method=full",
    f"model.new_weights=[{HEAD}]",
    "train.max_steps=2",
    "train.lr=0.001",
    "eval.suites=[]",
    "eval.other_text=null",
]


@pytest.fixture
def _group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group")
def test_new_weights_are_drawn_again_after_step_0(base: Path, recipe: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False)
    weights = {name: value for name, value in model.state_dict().items() if name != HEAD}
    model.save_pretrained(tmp_path / "base", state_dict=weights)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
    settings = read_recipe(str(recipe), [*SETTINGS, f"model.name={tmp_path / 'base'}"])
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    device = torch.device("cpu")
    pipeline.run_stages(settings, "whole", whole, device)
    copy_unfinished(whole, resumed, 0)
    assert find_newest_step(resumed) == 0
    (resumed / "metrics.jsonl").unlink()
    pipeline.run_stages(settings, "resumed", resumed, device)
    assert len(read_steps(whole)) == 2
    assert read_steps(resumed) == read_steps(whole)
    first, second = (load_file(run / "model" / "model.safetensors") for run in (whole, resumed))
    assert first.keys() == second.keys() and HEAD in first
    assert all(torch.equal(first[name], second[name]) for name in first)
