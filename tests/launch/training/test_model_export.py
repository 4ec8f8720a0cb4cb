"""A whole model is exported under the names of its base's files, and loads in plain transformers.

Tiny random models, one process. About 3 s.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from astra.weights import TorchWeights
from launch.runtime.errors import UserError, is_rank0_error
from launch.training import model_export
from launch.training.model_export import describe_weights, plan_layers, save_model, write_config
from launch.training.shards import INDEX, write_shards
from tests.support.architectures import configure_ernie, make_model

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def read_header(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Return the shape and the dtype of every weight in a folder, by name."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                values = file.get_slice(name)
                found[name] = (values.get_shape(), values.get_dtype())
    return found


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("source", ["loaded", "made"])
def test_an_export_has_the_names_of_the_base_and_the_trained_values(
    name: str, source: str, tmp_path: Path
) -> None:
    base, export = tmp_path / "base", tmp_path / "model"
    made = make_model(name)
    made.save_pretrained(base)
    # FSDP makes its model from the config, so that transformers keeps no conversions with it.
    model = load(base) if source == "loaded" else made
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    save_model(
        export,
        model,
        TorchWeights(),
        SimpleNamespace(model_path=base, dtype=torch.float32, head=None),
    )
    assert read_header(export) == read_header(base)
    with torch.no_grad():
        assert torch.equal(load(export)(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert not torch.equal(load(base)(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_what_transformers_keeps_in_fp32_is_not_rounded(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(configure_ernie())
    model.save_pretrained(tmp_path / "base")
    inputs = SimpleNamespace(model_path=tmp_path / "base", dtype=torch.bfloat16, head=None)
    save_model(tmp_path / "model", model, TorchWeights(), inputs)
    loaded = load(tmp_path / "model")
    dtypes = set()
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).to(parameter.dtype)), name
        dtypes.add(parameter.dtype)
    assert dtypes == {torch.bfloat16, torch.float32}


def test_layers_are_converted_one_by_one_where_that_gives_the_same() -> None:
    model = make_model("mixtral")
    weights = describe_weights(model, torch.bfloat16)
    layers = plan_layers(model, weights)
    assert len(layers) == 3  # the two layers, and what is outside of them
    assert sorted(name for names in layers for name in names) == sorted(weights)


def test_weights_are_converted_where_an_error_of_rank_0_reaches_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("mixtral")
    model.save_pretrained(tmp_path / "base")
    inputs = SimpleNamespace(model_path=tmp_path / "base", dtype=torch.float32, head=None)

    def refuse(_model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if any(weight.is_meta for weight in weights.values()):
            return revert_weight_conversion(_model, weights)
        raise NotImplementedError("no reverse")

    monkeypatch.setattr(model_export, "revert_weight_conversion", refuse)
    with pytest.raises(NotImplementedError) as caught:
        save_model(tmp_path / "model", model, TorchWeights(), inputs)
    assert is_rank0_error(caught.value)


def test_everything_but_weights_is_copied(tmp_path: Path) -> None:
    base, export = tmp_path / "base", tmp_path / "model"
    model = make_model("llama")
    model.save_pretrained(base, max_shard_size="20KB")
    assert (base / INDEX).is_file()
    kept = ["chat_template.jinja", "generation_config.json", "tokenizer.model", "merges.txt"]
    kept.append("additional_chat_templates/tools.jinja")
    left = ["pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_config.json", "x.gguf"]
    (base / "additional_chat_templates").mkdir()
    for file in (*kept, *left):
        (base / file).write_text("{}")
    stale = export / "model-00001-of-00002.safetensors"  # of an export that was killed
    export.mkdir()
    stale.write_text("")
    save_model(
        export,
        model,
        TorchWeights(),
        SimpleNamespace(model_path=base, dtype=torch.bfloat16, head=None),
    )
    found = {str(path.relative_to(export)) for path in export.rglob("*") if path.is_file()}
    assert found == {*kept, "config.json", "model.safetensors"}
    assert json.loads((export / "config.json").read_text())["dtype"] == "bfloat16"
    assert {dtype for _, dtype in read_header(export).values()} == {"BF16"}


def test_a_base_that_names_its_file_of_weights_is_exported_under_the_usual_name(
    tmp_path: Path,
) -> None:
    base, export = tmp_path / "base", tmp_path / "model"
    model = make_model("llama")
    model.save_pretrained(base)
    (base / "model.safetensors").rename(base / "own.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(config | {"transformers_weights": "own.safetensors"})
    )
    save_model(
        export,
        model,
        TorchWeights(),
        SimpleNamespace(model_path=base, dtype=torch.float32, head=None),
    )
    with torch.no_grad():
        assert torch.equal(load(export)(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_weights_that_transformers_would_not_find_are_refused_when_they_are_written(
    tmp_path: Path,
) -> None:
    base = tmp_path / "base"
    make_model("llama").save_pretrained(base)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "part-00001.safetensors").write_text("")
    with pytest.raises(UserError, match=r"export: .*model has no model\.safetensors"):
        write_config(base, tmp_path / "model", torch.float32)


def test_weights_are_written_file_by_file(tmp_path: Path) -> None:
    fused = torch.arange(24.0).reshape(4, 3, 2)
    wanted = {f"expert.{i}": expert for i, expert in enumerate(fused)}  # views of one tensor
    wanted["transposed"] = torch.arange(12.0).reshape(3, 4).T
    wanted["scalar"], wanted["empty"] = torch.tensor(2.0), torch.zeros(0, 3)
    wanted["large"] = torch.ones(100)
    wanted["same"] = wanted["large"]
    write_shards(tmp_path, [{name: value} for name, value in wanted.items()], max_bytes=500)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in wanted.values())
    assert set(index["weight_map"].values()) == {path.name for path in tmp_path.glob("*.safe*s")}
    for name, value in wanted.items():
        path = tmp_path / index["weight_map"][name]
        assert path.stat().st_size < 500 + 900
        with safe_open(path, framework="pt") as file:
            assert torch.equal(file.get_tensor(name), value)


def test_two_weights_of_one_name_are_refused(tmp_path: Path) -> None:
    part = {"a": torch.ones(2)}
    with pytest.raises(ValueError, match="two weights are called a"):
        write_shards(tmp_path, [part, part])


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    model = make_model("qwen2")
    assert isinstance(model.lm_head, nn.Linear)
    assert "lm_head.weight" not in describe_weights(model, torch.float32)
