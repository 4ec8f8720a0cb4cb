"""A run that could not be saved at its end is refused after its first step, by one line.

Plain AdamW on tiny random models in one process. About 5 s.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

from astra.adapter import read_factors
from astra.weights import TorchWeights
from launch.config.schema import Adapter, Train
from launch.engines.base import MOMENTS, TrainState
from launch.engines.single import SingleEngine
from launch.runtime.errors import UserError
from launch.training import model_export
from launch.training.checkpoint import REHEARSAL, CheckpointStore, Rehearsal, restore_training
from launch.training.loop import make_train_state
from launch.training.rehearsal import (
    describe_unreached,
    find_unreached_adapters,
    refuse_unsaveable,
    require_space,
)
from launch.training.trainable import (
    attach_trainable,
    export_trained,
    find_lora_layers,
    find_trained_parameters,
)
from tests.support.architectures import make_model

CPU = torch.device("cpu")
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def start(model: nn.Module) -> TrainState:
    """Make the training state of a model, which may be an adapted one."""
    return make_train_state(SingleEngine(CPU, torch.float32), model, Train(lr=0.01))


def take_step(state: TrainState) -> None:
    """Train on one row."""
    indices = torch.arange(10)
    state.backward(state.model(IDS, indices, IDS[0, indices + 1]), True)
    state.step(0.01)


def save(run: Path, model: nn.Module, state: TrainState, rehearsal: bool) -> Rehearsal | None:
    """Save a checkpoint and the export of a run, or rehearse that."""
    store = CheckpointStore(run, 2)
    initial = read_factors(find_lora_layers(model), TorchWeights())
    parameters = find_trained_parameters(model)
    base = {"name": "base", "weights_sha256": "", "revision": "main", "revision_verified": False}
    inputs = SimpleNamespace(model_path=run / "base", dtype=torch.float32, base=base, head=None)
    found, folder = None, run
    if rehearsal:
        found = store.rehearse(parameters, initial, state, {"drift": 0.0}, [])
        folder = found.folder
    else:
        store.save(0, parameters, initial, state, {"drift": 0.0}, [])
    engine = SingleEngine(CPU, torch.float32)
    export_trained(folder, model, engine, inputs, initial, rehearsal=rehearsal)
    return found


def list_tensors(folder: Path) -> set[tuple[str, str]]:
    """Return file and name of every tensor below a folder."""
    found = set()
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                found.add((str(path.relative_to(folder)), name))
    return found


def measure(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gemma3", "qwen2"])
def test_a_rehearsal_writes_the_names_of_what_is_saved(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path / "base")
    state = start(model)
    take_step(state)
    rehearsed = tmp_path / "checkpoints" / REHEARSAL
    found = save(tmp_path, model, state, rehearsal=True)
    assert found.folder == rehearsed
    names, size = list_tensors(rehearsed), measure(rehearsed)
    save(tmp_path, model, state, rehearsal=False)
    assert not rehearsed.exists()  # the checkpoint removed it
    saved = tmp_path / "checkpoints" / "step-0000000"
    assert {key for key in names if key[0] == "tensors.safetensors"} == list_tensors(saved)
    exported = {(f"model/{file}", key) for file, key in list_tensors(tmp_path / "model")}
    assert {key for key in names if key[0] != "tensors.safetensors"} == exported
    assert size < 0.6 * measure(tmp_path / "model") + 0.2 * measure(saved)
    assert found.num_bytes == pytest.approx(measure(saved), rel=0.1)
    copied = {path.name for path in (tmp_path / "base").glob("*.json")}
    assert copied <= {path.name for path in (tmp_path / "model").iterdir()}


@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
def test_adapters_are_rehearsed_with_one_module(method: str, tmp_path: Path) -> None:
    settings = Adapter(method=method, rank=2, alpha=2, targets=["q_proj", "o_proj"])
    model = attach_trainable(make_model("mixtral").requires_grad_(False), settings)
    state = start(model)
    take_step(state)
    found = save(tmp_path, model, state, rehearsal=True)
    files = {path.relative_to(found.folder) for path in found.folder.rglob("*.*")}
    modules = {
        key.rpartition(".lora_")[0] for file, key in list_tensors(found.folder) if "/" in file
    }
    save(tmp_path, model, state, rehearsal=False)
    assert len(modules) == 1
    exports = {path for path in files if len(path.parts) > 1}
    assert exports and all((tmp_path / path).is_file() for path in exports)
    trained = list(find_trained_parameters(model))
    assert any(name.endswith(".A") for name in found.unreached)  # as B is 0
    assert find_unreached_adapters(found.unreached, trained) == []


@pytest.mark.parametrize("error", [NotImplementedError("no reverse"), KeyError("exp_avg")])
def test_what_cannot_be_exported_is_refused_by_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise error

    model = make_model("mixtral")
    model.save_pretrained(tmp_path / "base")
    state = start(model)
    take_step(state)
    monkeypatch.setattr(model_export, "revert_weight_conversion", refuse)
    with (
        pytest.raises(UserError, match=f"could not be saved at its end.*{type(error).__name__}"),
        refuse_unsaveable(CheckpointStore(tmp_path, 2)),
    ):
        save(tmp_path, model, state, rehearsal=True)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = make_model("qwen2")
    state = start(model)
    take_step(state)
    parameter = model.model.norm.weight
    state.optimizer.state[parameter][MOMENTS[1]] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"norm\.weight\.exp_avg_sq has the shape"):
        save(tmp_path, model, state, rehearsal=True)


def test_a_parameter_that_is_not_contiguous_comes_back_from_a_folder_of_any_name(
    tmp_path: Path,
) -> None:
    tmp_path /= "of [my] 1st* rün?"
    model = make_model("llama")
    parameter = model.model.layers[0].mlp.up_proj.weight
    parameter.data = parameter.data.T.contiguous().T
    model.save_pretrained(tmp_path / "base")
    state = start(model)
    take_step(state)
    assert not parameter.is_contiguous()
    save(tmp_path, model, state, rehearsal=True)
    save(tmp_path, model, state, rehearsal=False)
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, parameter)


def test_an_unreached_tower_has_moments_of_zero_and_trains_on_alike_after_a_resume(
    tmp_path: Path,
) -> None:
    model = make_model("gemma3")
    model.save_pretrained(tmp_path / "base")
    state = start(model)
    take_step(state)
    found = save(tmp_path, model, state, rehearsal=True)
    parameters = find_trained_parameters(model)
    tower = [name for name in parameters if "vision_tower" in name or "projector" in name]
    assert found.unreached == tower
    store = CheckpointStore(tmp_path, 2)
    store.save(1, parameters, {}, state, {}, [])
    resumed = make_model("gemma3")
    resumed_state = start(resumed)
    restore_training(store.find_newest(), find_trained_parameters(resumed), resumed_state, CPU)
    # A gradient reaches the tower only now.
    for one, one_state in ((model, state), (resumed, resumed_state)):
        tower_weight = one.model.vision_tower.embeddings.patch_embedding.weight
        (tower_weight**2).sum().backward()
        take_step(one_state)
    for name, parameter in find_trained_parameters(resumed).items():
        assert torch.equal(parameter, parameters[name]), name


def test_the_line_names_the_largest_modules_without_a_gradient() -> None:
    trained = [f"model.tower.layers.{i}.{side}.weight" for i in range(3) for side in "qk"]
    trained += ["model.tower.norm.weight"]
    trained += [f"model.layers.{i}.mlp.experts.{j}.up" for i in range(2) for j in range(4)]
    unreached = [name for name in trained if "tower" in name or ".experts.3." in name]
    line = describe_unreached(unreached, trained, decays=False)
    assert line.startswith("9 of 15 trained parameters had no gradient so far: model.tower.*, ")
    assert "model.layers.*.mlp.experts.*.*; unless" in line
    assert line.endswith("they stay as they are")
    assert describe_unreached(unreached, trained, True).endswith("only weight decay changes them")
    many = [f"{letter}.weight" for letter in "abcdef"]
    assert "a.*, b.*, c.* and 2 more;" in describe_unreached(many[:5], many, decays=False)


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    require_space(tmp_path, 1000)
    with pytest.raises(UserError, match=r"No space left on device: .* 1073741824.00 GiB, and"):
        require_space(tmp_path, 2**60)
