"""Proves what plan.py prints, against the arithmetic and the tensors of a small model.

Needs nothing; takes a minute. bench/memory.py compares planned peaks with measured ones.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    DebertaV2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)

from astra.adapter import attach_adapters, find_targets
from launch.config.loading import read_recipe, validate_recipe
from launch.config.schema import Recipe
from launch.planning.estimate import Estimate, estimate_run
from launch.planning.machine import make_machine
from launch.planning.options import PlanOptions
from launch.planning.printout import count_planned_steps, print_plan
from launch.runtime.errors import UserError
from launch.runtime.units import GIB
from launch.training.loss import AnswerLoss
from tests.support.paths import ROOT

CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
LENGTH, SAMPLES = 128, 10
LAYER_ELEMENTS = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 160  # of the targets' weights


def make_recipe(engine: str = "fsdp", **sections: dict) -> Recipe:
    """Make a recipe with other fields in some sections."""
    values = {
        "model": {"name": "m"},
        "data": {"path": "d", "max_length": LENGTH},
        "adapter": {"rank": 4, "alpha": 4},
        "calibration": {"samples": SAMPLES},
        "train": {"global_batch": 8, "micro_batch": 2},
        "engine": engine,
    }
    for name, fields in sections.items():
        values[name] = values.get(name, {}) | fields
    return validate_recipe(values)


def plan(recipe: Recipe, world_size: int = 1, checkpointing: bool = False) -> Estimate:
    """Estimate three steps of a recipe with the small model in fp32."""
    return estimate_run(
        CONFIG,
        recipe,
        make_machine(None, world_size),
        dtype=torch.float32,
        checkpointing=checkpointing,
        steps=3,
    )


def halve_statistics(estimate: Estimate) -> float:
    """Return the GiB in which half of the calibration's statistics can be held and worked out."""
    (window,) = estimate.windows.windows
    return (window.sums_bytes / 2 + estimate.windows.working_bytes) / GIB


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    base = LlamaForCausalLM(CONFIG).requires_grad_(False)
    return attach_adapters(base, make_recipe().adapter.targets, 4, 4, 0.0)


def test_parameters_are_the_models(model: nn.Module) -> None:
    estimate = plan(make_recipe())
    assert estimate.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert estimate.parameters == sum(p.numel() for p in model.parameters() if not p.requires_grad)


def test_arithmetic_of_calibration_is_that_of_its_products() -> None:
    attention = 2 * 2 * LENGTH**2 * 64  # scores and their product with the values
    head = 2 * 64 * 300  # of one token of each sample
    per_sample = 6 * (2 * LENGTH * LAYER_ELEMENTS + attention) + head
    assert plan(make_recipe()).calibration.flops == SAMPLES * per_sample


def test_activations_are_what_backward_keeps(model: nn.Module) -> None:
    sizes = {}  # address of a storage -> its bytes

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(2, LENGTH, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        every_token = torch.arange(ids.numel() - 1)
        loss = AnswerLoss(model.train())(ids, every_token, ids.flatten()[1:])
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = sum(size for address, size in sizes.items() if address not in weights)
    planned = plan(make_recipe()).training.memory["activations"]
    assert kept <= planned <= 1.5 * kept  # tensors that are freed on the way come to it
    assert loss.requires_grad


def test_checkpointing_saves_memory_for_a_third_more_arithmetic() -> None:
    plain, saving = plan(make_recipe()), plan(make_recipe(), checkpointing=True)
    assert saving.training.memory["activations"] < 0.5 * plain.training.memory["activations"]
    assert 1.3 < saving.training.flops / plain.training.flops < 1.6


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "ratio"), [("fsdp", 2), ("zero3", 2), ("zero2", 1)])
def test_what_is_sharded_falls_with_the_world_size(engine: str, ratio: int) -> None:
    two, four = (plan(make_recipe(engine), size).training.memory for size in (2, 4))
    assert two["base"] / four["base"] == ratio
    assert two["activations"] == four["activations"]
    assert plan(make_recipe("fsdp"), 2).training.memory["activations"] == two["activations"]


@pytest.mark.slow
def test_windows_follow_the_budget() -> None:
    whole = plan(make_recipe())
    assert whole.hidden_states == 0
    halved = plan(make_recipe(calibration={"memory_gib": halve_statistics(whole)}))
    assert [list(window.layers) for window in halved.windows.windows] == [[0, 1, 2], [3, 4, 5]]
    assert halved.hidden_states == SAMPLES * LENGTH * 64 * 4
    assert halved.calibration.peak < whole.calibration.peak
    assert plan(make_recipe(adapter={"method": "lora"})).calibration.memory["statistics"] == 0


def test_windows_follow_the_gpus_memory_where_the_limit_is_auto() -> None:
    whole = plan(make_recipe())
    assert len(whole.windows.windows) == 1  # without the memory of the GPUs
    statistics = whole.windows.windows[0].sums_bytes
    room = whole.calibration.peak - statistics / 2 + whole.windows.working_bytes
    machine = replace(make_machine(None, 1), usable=room)
    estimate = estimate_run(
        CONFIG, make_recipe(), machine, dtype=torch.float32, checkpointing=False, steps=3
    )
    assert len(estimate.windows.windows) >= 2
    assert estimate.calibration.peak <= room
    assert estimate.sum_flops == whole.sum_flops


def test_gpus_that_are_slow_in_fp64_leave_the_solving_to_cpus(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    CONFIG.save_pretrained(tmp_path)
    recipe = make_recipe(model={"name": str(tmp_path)}, data={"limit": 20})
    for tflops, is_said in ((67.0, False), (0.25, True)):
        options = PlanOptions(make_machine(None, 2, fp64_tflops=tflops, num_cores=64))
        assert print_plan(recipe, options)
        said = "on 64 CPU cores a GPU, which are sooner than a GPU this slow in fp64"
        assert (said in capsys.readouterr().out) == is_said


def test_the_layout_of_several_nodes_is_said_where_there_are_several(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    CONFIG.save_pretrained(tmp_path)
    recipe = make_recipe(model={"name": str(tmp_path)}, data={"limit": 20})
    recipe = recipe.model_copy(update={"shard_within": "node"})
    for world_size, is_said in ((2, False), (4, True)):
        assert print_plan(recipe, PlanOptions(make_machine(None, world_size, node_size=2)))
        printed = capsys.readouterr().out
        assert (", each node holds the base" in printed) == is_said
        table = printed[printed.index("\nengines, for a step of ") :].splitlines()
        assert [line.split()[0] for line in table[3:5]] == ["fsdp", "zero3"]
        assert table[5].startswith("recommended: engine=fsdp: ")


@pytest.mark.parametrize("config", [BertConfig(), DebertaV2Config()], ids=["bert", "deberta"])
def test_a_base_that_cannot_be_planned_is_refused_before_anything_is_printed(
    config: PretrainedConfig, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config.save_pretrained(tmp_path)
    recipe = make_recipe(model={"name": str(tmp_path)}, data={"limit": 20})
    with pytest.raises(UserError, match=f"^model.name: {config.model_type} is an encoder"):
        print_plan(recipe, PlanOptions(make_machine(None, 1)))
    assert capsys.readouterr().out == ""


def test_a_decoder_that_had_a_head_for_labels_is_planned_as_a_language_model(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    printed = []
    for problem_type in (None, "single_label_classification"):
        config = LlamaConfig(**(CONFIG.to_diff_dict() | {"problem_type": problem_type}))
        config.save_pretrained(tmp_path)
        recipe = make_recipe(model={"name": str(tmp_path)}, data={"limit": 20})
        assert print_plan(recipe, PlanOptions(make_machine(None, 1)))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_a_base_without_gradient_checkpointing_is_planned_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    CONFIG.save_pretrained(tmp_path)
    sections = {"model": {"name": str(tmp_path)}, "data": {"limit": 20}}
    options = PlanOptions(make_machine(None, 1, memory=0.001))  # where `auto` is on elsewhere
    assert not print_plan(make_recipe(**sections), options)
    assert "gradient checkpointing off" in capsys.readouterr().out
    recipe = make_recipe(**sections, train={"gradient_checkpointing": True})
    with pytest.raises(UserError, match=r"^train\.gradient_checkpointing: LlamaForCausalLM"):
        print_plan(recipe, options)


@pytest.mark.parametrize(("method", "num_exported"), [("rslora", 2), ("dora", 1)])
def test_other_adapters_are_counted_as_they_are(method: str, num_exported: int) -> None:
    estimate = plan(make_recipe(adapter={"method": method}))
    base = LlamaForCausalLM(CONFIG).requires_grad_(False)
    targets = make_recipe().adapter.targets
    model = attach_adapters(base, targets, 4, 4, 0.0, dora=method == "dora")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert estimate.trainable == trained
    assert list(estimate.files.values())[:2] == [16 * trained, num_exported * 4 * trained]
    assert estimate.windows is None


def test_further_exports_are_counted() -> None:
    estimate = plan(make_recipe(export={"rank": 3, "merged": True}))
    base = LlamaForCausalLM(CONFIG)
    linears = find_targets(base, make_recipe().adapter.targets).values()
    sides = sum(linear.in_features + linear.out_features for linear in linears)
    assert estimate.files["export: lora_small"] == 4 * 3 * sides
    count = sum(parameter.numel() for parameter in base.parameters())
    assert estimate.files["export: merged"] == 4 * count


@pytest.mark.parametrize(
    ("engine", "parameter_bytes"), [("single", 16), ("fsdp", 16), ("zero3", 20), ("zero2", 20)]
)
def test_full_holds_gradients_and_moments_of_all_parameters(
    engine: str, parameter_bytes: int
) -> None:
    count = sum(parameter.numel() for parameter in LlamaForCausalLM(CONFIG).parameters())
    estimate = plan(make_recipe(engine, adapter={"method": "full"}))
    assert estimate.parameters == estimate.trainable == count
    # DeepSpeed's bucket of gradients is larger than this model.
    buffer = 4 * count if engine.startswith("zero") else 0
    held = estimate.training.memory
    assert held["base"] + held["gradients and optimiser"] == parameter_bytes * count + buffer
    assert list(estimate.files.values())[:2] == [12 * count, 4 * count]


def test_full_is_sharded_by_fsdp() -> None:
    count = sum(parameter.numel() for parameter in LlamaForCausalLM(CONFIG).parameters())
    held = plan(make_recipe("fsdp", adapter={"method": "full"}), 2).training.memory
    assert held["base"] + held["gradients and optimiser"] == 8 * count


@pytest.mark.slow
def test_what_a_method_needs_of_a_calibration_is_what_is_planned() -> None:
    forward, backward, weights = (
        plan(make_recipe(adapter={"method": name})) for name in ("eva", "lora_ga", "pissa")
    )
    # The backward pass of a frozen model costs what the forward pass does. Two things make up the
    # rest: the head on every token, and attention, whose backward pass costs 2.5 times the forward.
    assert 2 < backward.calibration.flops / forward.calibration.flops < 2.6
    elements = 6 * LAYER_ELEMENTS
    assert backward.windows.windows[0].sums_bytes == 8 * (elements + 6 * 7)
    assert backward.sum_flops == SAMPLES * LENGTH * 2 * elements
    assert (weights.calibration.flops, weights.sum_flops) == (0, 0)
    assert weights.windows.windows[0].sums_bytes == 0
    assert weights.solve_flops > 0
    settings = {"memory_gib": halve_statistics(backward)}
    twice = plan(make_recipe(adapter={"method": "lora_ga"}, calibration=settings))
    assert twice.calibration.flops == 2 * backward.calibration.flops
    assert twice.hidden_states == 0


@pytest.mark.parametrize(
    ("data", "num_rows", "num_trained"),
    [
        ({"limit": 100}, None, 100),
        ({"limit": 100, "held_out": 20}, None, 80),
        ({"limit": 100, "held_out": 20}, 60, 40),
        ({"limit": 100, "held_out": 20}, 600, 80),
        ({"held_out": 20}, 60, 40),
        ({"path": "quickstart"}, None, 3600),
        ({"path": "quickstart", "held_out": 200}, None, 3400),
        ({"path": "quickstart", "limit": 5000}, 4000, 3600),
    ],
    ids=str,
)
def test_held_out_rows_and_those_beyond_a_limit_are_not_trained_on(
    data: dict, num_rows: int | None, num_trained: int
) -> None:
    recipe = make_recipe(data=data, train={"global_batch": 1, "micro_batch": 1, "epochs": 1})
    assert count_planned_steps(recipe, PlanOptions(make_machine(None, 1), num_rows)) == num_trained


def test_a_plan_without_a_row_to_train_on_is_refused() -> None:
    options = PlanOptions(make_machine(None, 1), num_rows=20)
    message = "^data.held_out: 20 of 20 rows leave none to train on; lower it"
    with pytest.raises(UserError, match=message):
        count_planned_steps(make_recipe(data={"held_out": 20}), options)


def run_script(script: str, *arguments: object, code: int = 0) -> str:
    """Run a command, check its exit code, and return everything that it printed."""
    command = [sys.executable, ROOT / "launch" / script, *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["metamath", "codefeedback", "commonsense", "quickstart", "smollm2"]
)
def test_every_recipe_has_a_plan_with_a_table_of_engines(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of a small model in the base's place, on 16 GPUs in two nodes."""
    CONFIG.save_pretrained(tmp_path)
    overrides = [] if name == "quickstart" else [f"model.name={tmp_path}", "adapter.rank=4"]
    recipe = read_recipe(name, [*overrides, "engine=auto"])
    assert print_plan(recipe, PlanOptions(make_machine("NVIDIA L40S", 16)))
    printed = capsys.readouterr().out
    table = printed[printed.index("\nengines, for a step of ") :].splitlines()
    assert [line.split()[0] for line in table[3:7]] == ["zero2", "fsdp", "zero3", "zero3_offload"]
    assert table[7].startswith("recommended: engine=zero2: it fits (")
    assert "GPU: NVIDIA L40S: 362.05 TFLOP/s in bf16" in printed
    assert "2 nodes of 8, each with 50 GB/s to the others" in printed
    assert "GPU hours" in printed


@pytest.mark.slow
def test_the_command_needs_no_weights_and_says_whether_it_fits(tmp_path: Path) -> None:
    CONFIG.save_pretrained(tmp_path)
    settings = ["--set", f"model.name={tmp_path}", "--set", "adapter.rank=8"]
    options = ["--recipe", "metamath", *settings, "--gpus", 4]
    printed = run_script("plan.py", *options, "--gpu-memory", 10)
    assert "782 steps" in printed
    assert "1 window" in printed
    assert "zero3 fits" in printed
    printed = run_script("train.py", "--plan", *options, "--gpu-memory", 1.51, code=1)
    assert "zero3 does not fit in 1.51 GiB, of which 0.009 are to be filled: " in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "--gpus: 0 is not a number above 0"),
        (["--set", "model.name=/nowhere"], "model.name: no folder /nowhere"),
        (["--set", "data.limit=null"], "--rows: how many rows there are"),
    ],
    ids=str,
)
def test_what_is_missing_is_named(options: list[str], message: str, tmp_path: Path) -> None:
    CONFIG.save_pretrained(tmp_path)
    model = ["--set", f"model.name={tmp_path}"]
    printed = run_script("plan.py", "--recipe", "metamath", *model, *options, code=2)
    assert f"error: {message}" in printed
