"""A merged model has the names of its base's files, and computes what base and adapter compute.

Tiny random models, one process. About 3 s.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from astra.adapter import attach_adapters, get_lora_layers
from astra.weights import TorchWeights
from launch.training import merged_export
from launch.training.merged_export import FOLDER, compute_merged, describe_merged, save_merged
from tests.support.architectures import make_model

IDS = torch.arange(3, 40)[None]
TARGETS = {
    "llama": ["q_proj", "down_proj", "lm_head"],
    "qwen2": ["q_proj", "down_proj"],  # a tied head
    "mixtral": ["q_proj", "o_proj"],  # fused experts, which the files hold one by one
    "deepseek_v3": ["kv_b_proj", "o_proj"],  # a persistent buffer
    "gpt_oss": ["q_proj", "v_proj"],  # biases
}


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_a_merged_model_computes_what_the_adapter_does(
    name: str, dora: bool, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    make_model(name).save_pretrained(base)
    loaded = AutoModelForCausalLM.from_pretrained(base).eval().requires_grad_(False)
    with torch.no_grad():
        original = loaded(input_ids=IDS).logits
    model = attach_adapters(loaded, TARGETS[name], 4, 6, 0.0, dora=dora).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.rand_like(parameter)
        wanted = model(input_ids=IDS).logits
    inputs = SimpleNamespace(model_path=base, dtype=torch.float32, head=None)
    save_merged(tmp_path, model, TorchWeights(), inputs)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / FOLDER).eval()
    found, files = (load_file(f / "model.safetensors") for f in (tmp_path / FOLDER, base))
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in files.items()
    }
    with torch.no_grad():
        logits = merged(input_ids=IDS).logits
    moved = (wanted - original).abs().max()
    assert moved > 0.1
    # 1e-4: for fp32, whose products are added in another order.
    assert (logits - wanted).abs().max() < 1e-4 * moved


def test_bf16_is_rounded_once_from_fp64(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_model("llama").bfloat16().save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)
    model = attach_adapters(model, ["q_proj"], 4, 6, 0.0)
    layers = get_lora_layers(model)
    for layer in layers.values():
        layer.lora_B["default"].weight.data.normal_(std=0.1)
    save_merged(
        tmp_path,
        model,
        TorchWeights(),
        SimpleNamespace(model_path=base, dtype=torch.bfloat16, head=None),
    )
    found, files = (load_file(f / "model.safetensors") for f in (tmp_path / FOLDER, base))
    for key, value in found.items():
        name = key.removesuffix(".weight")
        if name in layers:
            assert torch.equal(value, compute_merged(layers[name], TorchWeights()).bfloat16())
            assert not torch.equal(value, files[key])
        else:
            assert torch.equal(value, files[key])


def test_a_rehearsal_writes_every_name_and_merges_one_layer(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_model("mixtral").save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)
    model = attach_adapters(model, ["q_proj", "o_proj"], 4, 6, 0.0)
    inputs = SimpleNamespace(model_path=base, dtype=torch.float32, head=None)
    save_merged(tmp_path, model, TorchWeights(), inputs, rehearsal=True)
    found, files = (load_file(f / "model.safetensors") for f in (tmp_path / FOLDER, base))
    assert found.keys() == files.keys()
    assert 0 < sum(value.numel() > 0 for value in found.values()) < len(files)
    described = describe_merged(model, torch.float32)
    num_bytes = sum(value.nbytes for value in described.values())
    assert num_bytes == sum(value.nbytes for value in files.values())


def test_merged_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    make_model("llama").save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)
    model = attach_adapters(model, ["q_proj"], 4, 6, 0.0)
    inputs = SimpleNamespace(model_path=base, dtype=torch.float32, head=None)
    save_merged(tmp_path, model, TorchWeights(), inputs)
    (tmp_path / FOLDER / "stale.json").write_text("{}")
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(merged_export, "write_config", lambda *_: 1 / 0)
        save_merged(tmp_path, model, TorchWeights(), inputs)
    assert not (tmp_path / FOLDER).exists()
    save_merged(tmp_path, model, TorchWeights(), inputs)
    assert {path.name for path in tmp_path.iterdir()} == {"base", FOLDER}
    assert not (tmp_path / FOLDER / "stale.json").exists()
