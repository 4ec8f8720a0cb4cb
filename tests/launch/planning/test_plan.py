"""What plan.py says, against the model that it stands for; measured peaks are compared in bench/memory.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from astra import adapter
from launch.config.schema import Recipe, validate
from launch.planning.estimate import Estimate, estimate
from launch.training.loss import AnswerLoss

ROOT = Path(__file__).resolve().parents[3]
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


def recipe(engine: str = "fsdp", **sections: dict) -> Recipe:
    values = {
        "model": {"name": "m"},
        "data": {"path": "d", "max_length": LENGTH},
        "adapter": {"rank": 4, "alpha": 4},
        "calibration": {"samples": SAMPLES},
        "train": {"global_batch": 8, "micro_batch": 2},
        "engine": engine,
    }
    return validate(
        values | {name: values.get(name, {}) | section for name, section in sections.items()}
    )


def plan(recipe: Recipe, ranks: int = 1, checkpointing: bool = False) -> Estimate:
    return estimate(
        CONFIG, recipe, ranks=ranks, dtype=torch.float32, checkpointing=checkpointing, steps=3
    )


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).requires_grad_(False)
    return adapter.attach(model, recipe().adapter.targets, 4, 4, 0.0)


def test_parameters_are_the_models(model: nn.Module) -> None:
    found = plan(recipe())
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.parameters == sum(p.numel() for p in model.parameters() if not p.requires_grad)


def test_arithmetic_of_calibration_is_that_of_its_products() -> None:
    found = plan(recipe())
    per_layer = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 160
    attention = 2 * 2 * LENGTH**2 * 64  # scores and their product with the values
    head = 2 * 64 * 300  # of one token a row
    assert found.calibration.flops == SAMPLES * (6 * (2 * LENGTH * per_layer + attention) + head)


def test_activations_are_what_backward_keeps(model: nn.Module) -> None:
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.zeros(2, LENGTH, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        counted = torch.arange(ids.numel() - 1)
        loss = AnswerLoss(model.train())(ids, counted, ids.flatten()[1:])
    of_weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = sum(size for address, size in kept.items() if address not in of_weights)
    found = plan(recipe()).training.memory["activations"]
    assert saved <= found <= 1.5 * saved  # what is made on the way comes to it
    assert loss.requires_grad


def test_checkpointing_saves_memory_for_a_third_more_arithmetic() -> None:
    plain, saving = plan(recipe()), plan(recipe(), checkpointing=True)
    assert saving.training.memory["activations"] < 0.5 * plain.training.memory["activations"]
    assert 1.3 < saving.training.flops / plain.training.flops < 1.6


def test_what_is_sharded_falls_with_the_ranks() -> None:
    for engine, shared in [("fsdp", True), ("zero3", True), ("zero2", False)]:
        two, four = (plan(recipe(engine), ranks).training.memory for ranks in (2, 4))
        assert two["base"] / four["base"] == (2 if shared else 1)
    assert plan(recipe("fsdp"), 2).training.memory["activations"] == two["activations"]


def test_windows_follow_the_budget() -> None:
    whole = plan(recipe())
    assert len(whole.windows.windows) == 1
    assert whole.hidden_states == 0
    budget = (whole.windows.windows[0].statistics / 2 + whole.windows.working) / 2**30
    halved = plan(recipe(calibration={"memory_gib": budget}))
    assert [list(window.layers) for window in halved.windows.windows] == [[0, 1, 2], [3, 4, 5]]
    assert halved.hidden_states == SAMPLES * LENGTH * 64 * 4
    assert halved.calibration.peak < whole.calibration.peak
    assert plan(recipe(adapter={"method": "lora"})).calibration.memory["statistics"] == 0


@pytest.mark.parametrize(("method", "exported"), [("rslora", 2), ("dora", 1)])
def test_other_adapters_are_counted_as_they_are(method: str, exported: int) -> None:
    found = plan(recipe(adapter={"method": method}))
    base = LlamaForCausalLM(CONFIG).requires_grad_(False)
    model = adapter.attach(base, recipe().adapter.targets, 4, 4, 0.0, dora=method == "dora")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.trainable == trained
    assert list(found.files.values())[:2] == [16 * trained, exported * 4 * trained]
    assert found.windows is None


def test_full_holds_gradients_and_moments_of_all_parameters() -> None:
    count = sum(p.numel() for p in LlamaForCausalLM(CONFIG).parameters())
    for engine, copies in [
        ("single", 16),
        ("fsdp", 16),
        ("zero3", 20),
        ("zero2", 20),
    ]:  # bytes of a parameter, fp32
        found = plan(recipe(engine, adapter={"method": "full"}))
        assert found.parameters == found.trainable == count
        buffer = (
            4 * count if engine.startswith("zero") else 0
        )  # the bucket of gradients is larger than this model
        held = found.training.memory
        assert held["base"] + held["gradients and optimiser"] == copies * count + buffer
    halved = plan(recipe("fsdp", adapter={"method": "full"}), 2).training.memory
    assert halved["base"] + halved["gradients and optimiser"] == 8 * count
    assert list(found.files.values())[:2] == [12 * count, 4 * count]


def test_what_a_method_needs_of_a_calibration_is_what_is_planned() -> None:
    forward, backward, weights = (
        plan(recipe(adapter={"method": name})) for name in ("eva", "lora_ga", "pissa")
    )
    # The backward pass of a frozen model costs what the forward pass does, the head is on every token, attention 2.5.
    assert 2 < backward.calibration.flops / forward.calibration.flops < 2.6
    elements = 6 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 160)
    assert backward.windows.windows[0].statistics == 8 * (elements + 6 * 7)
    assert backward.sum_flops == SAMPLES * LENGTH * 2 * elements
    assert (
        weights.calibration.flops,
        weights.sum_flops,
        weights.windows.windows[0].statistics,
    ) == (0, 0, 0)
    assert weights.solve_flops > 0
    halved = (backward.windows.windows[0].statistics / 2 + backward.windows.working) / 2**30
    twice = plan(recipe(adapter={"method": "lora_ga"}, calibration={"memory_gib": halved}))
    assert twice.calibration.flops == 2 * backward.calibration.flops
    assert twice.hidden_states == 0


def run(script: str, *arguments: object, code: int = 0) -> str:
    line = [sys.executable, ROOT / "launch" / script, *map(str, arguments)]
    done = subprocess.run(
        line, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_command_needs_no_weights_and_says_whether_it_fits(tmp_path: Path) -> None:
    CONFIG.save_pretrained(tmp_path)
    common = [
        "--recipe",
        "metamath",
        "--set",
        f"model.name={tmp_path}",
        "--set",
        "adapter.rank=8",
        "--gpus",
        4,
    ]
    said = run("plan.py", *common, "--gpu-memory", 10)
    assert "782 steps" in said
    assert "1 window" in said
    assert "it fits" in said
    said = run("train.py", "--plan", *common, "--gpu-memory", 0.0001, code=1)
    assert "it does not fit in 0.0001 GiB: calibration, initialisation, training" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus: must be above 0"),
        (["--set", "model.name=/nowhere"], "model.name: no folder /nowhere"),
        (["--set", "data.limit=null"], "--rows: how many training rows there are"),
    ],
    ids=str,
)
def test_what_is_missing_is_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    CONFIG.save_pretrained(tmp_path)
    said = run(
        "plan.py", "--recipe", "metamath", "--set", f"model.name={tmp_path}", *arguments, code=2
    )
    assert f"error: {message}" in said
