"""Every engine loads the weights that the checked files hold.

Proves that all parameters and stored buffers are bit by bit those that plain transformers loads,
whole or over two ranks: of sharded files with stray ones beside them, of experts that transformers
fuses, of buffers that are in the files, of tied heads and of a vision tower; and that a weight
declared as new is drawn alike. About 40 s.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from launch.models.check import draw_weight
from tests.support.architectures import make_model
from tests.support.paths import WORKERS

HEADLESS, HEAD, SEED = "headless", "lm_head.weight", 7  # as in workers/loading.py
ARCHITECTURES = ["llama", "gpt2", "mixtral", "deepseek_v3", "gemma3"]
# FSDP2's rank 1 has other matrix shapes only where 2 does not divide, so sums differ in rounding.
LOGIT_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the models, the first of them in shards with the shards of another save beside."""
    parent = tmp_path_factory.mktemp("models")
    made = {}
    for name in ARCHITECTURES:
        made[name] = parent / name
        model = make_model(name)
        model.save_pretrained(made[name], max_shard_size="20KB" if name == "llama" else "1GB")
    add_stray_files(made["llama"])
    made[HEADLESS] = parent / HEADLESS
    model = make_model("llama")
    weights = {key: value for key, value in model.state_dict().items() if key != HEAD}
    model.save_pretrained(made[HEADLESS], state_dict=weights)
    return made


def add_stray_files(folder: Path) -> None:
    """Put files that no index names beside a model's own: halves of all weights."""
    weights = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
    halves = {name: value / 2 for name, value in weights.items()}
    for stray in ("model_old.safetensors", "model-00001-of-00099.safetensors", "z.safetensors"):
        save_file(halves, folder / stray, {"format": "pt"})


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero3", marks=pytest.mark.full)])
def test_the_files_weights_are_loaded(
    engine: str, folders: dict[str, Path], launch: Callable, tmp_path: Path
) -> None:
    launch(WORKERS / "loading.py", engine, tmp_path, *folders.values(), ranks=2)
    ids = torch.arange(20, 44)[None]
    for name, folder in folders.items():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if name == HEADLESS:
            plain.lm_head.weight.data = draw_weight(folder, HEAD, SEED)
        found = load_file(tmp_path / f"{name}.safetensors")
        with torch.no_grad():
            logits = plain(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(
            found.pop("logits"), logits, rtol=LOGIT_TOLERANCE, atol=LOGIT_TOLERANCE
        )
        wanted = dict(plain.named_parameters())
        persistent = plain.state_dict().keys()
        wanted |= {key: value for key, value in plain.named_buffers() if key in persistent}
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value.detach(), rtol=0, atol=0, msg=key)
