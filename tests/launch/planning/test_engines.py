"""launch.planning.engines and decisions: which engine is chosen, why, and when it is chosen again.

Simulated: GPUs, their free memory, and the other ranks. The models are small; half a minute.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launch.config.loading import validate_recipe
from launch.config.schema import Recipe
from launch.planning import decisions
from launch.planning.decisions import CHECKPOINTING, ENGINE, decide_run
from launch.planning.engines import (
    compare_engines,
    fits,
    list_engines,
    recommend_engine,
    render_comparison,
)
from launch.planning.machine import RESERVE, Machine, make_machine
from launch.planning.model import ModelRun, run_without_numbers
from launch.runtime.errors import UserError
from launch.runtime.units import GIB

CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def make_recipe(engine: str = "auto", **train: object) -> Recipe:
    values = {
        "model": {"name": "m"},
        "data": {"path": "d", "max_length": 64},
        "adapter": {"rank": 4, "method": "lora"},
        "train": {"global_batch": 64, "micro_batch": 8} | train,
        "engine": engine,
    }
    return validate_recipe(values)


@pytest.fixture(scope="module")
def run() -> ModelRun:
    return run_without_numbers(CONFIG, make_recipe(), torch.bfloat16, 2, [False, True])


def make_small_machine(name: str, usable: float, world_size: int = 2) -> Machine:
    """Return GPUs of which a run may fill `usable` bytes."""
    machine = make_machine(name, world_size)
    return Machine(machine.name, machine.gpu, world_size, memory=1, usable=usable)


def test_the_fastest_that_fits_is_recommended_with_the_reason(run: ModelRun) -> None:
    recipe = make_recipe()
    machine = make_machine("H100", 2)
    estimates = compare_engines(run, recipe, machine, 1)
    assert list(estimates) == ["zero2", "fsdp", "zero3", "zero3_offload"]
    assert not any(one.checkpointing for one in estimates.values())
    found = recommend_engine(estimates, machine)
    # So small a model waits for its host, which has least to do under ZeRO-2.
    assert (found.estimate.engine, fits(found.estimate, machine)) == ("zero2", True)
    assert "its step is the shortest" in found.reason
    assert "bound by the host; " in found.reason

    # Room for zero2's step with checkpointing; then for none but sharded ones; then for none.
    with_it = min(one.training.peak for one in estimates.values() if one.engine == "zero2")
    tight = make_small_machine("H100", with_it - 1)
    estimates = compare_engines(run, recipe, tight, 1)
    assert estimates["zero2"].checkpointing
    assert estimates["zero2"].training.peak < with_it
    least = make_small_machine("H100", 1)
    nothing = recommend_engine(compare_engines(run, recipe, least, 1), least)
    assert not fits(nothing.estimate, least)
    assert "none fits, and it takes least" in nothing.reason
    table = render_comparison(estimates, tight).splitlines()
    assert len(table) == 1 + len(estimates)
    assert table[1].split()[:3] == ["zero2", "on", "yes"]


def test_equal_engines_leave_the_simplest() -> None:
    recipe = make_recipe()
    run = run_without_numbers(CONFIG, recipe, torch.bfloat16, 1, [False, True])
    machine = make_machine("L4", 1)
    found = recommend_engine(compare_engines(run, recipe, machine, 1), machine)
    assert found.estimate.engine == "single"
    assert "it is the simplest of 2 with equally short steps" in found.reason


def test_what_cannot_train_is_not_compared() -> None:
    assert "single" not in list_engines(make_recipe(), 2)
    assert list_engines(make_recipe(compile=True), 1) == ["single", "zero2", "fsdp"]
    nodes = make_recipe("fsdp").model_copy(update={"shard_within": "node"})
    assert [list_engines(nodes, size) for size in (1, 16)] == [["fsdp", "zero3"]] * 2


class World:
    """Ranks with GPUs or without, of which this is rank 0, and what it printed."""

    def __init__(self, model: Path, patch: pytest.MonkeyPatch) -> None:
        self.ranks = [(10 * GIB, "NVIDIA H100 80GB HBM3", "a")] * 2  # free bytes, GPU, host
        self.printed: list[str] = []
        self.num_gathered = 0
        checked = SimpleNamespace(head_parameters=())
        self.inputs = SimpleNamespace(
            model_path=model, dtype=torch.bfloat16, head=None, model=checked
        )
        patch.setattr(decisions, "measure_free_memory", lambda _: self.ranks[0][0])
        patch.setattr(decisions, "run_on_rank0", lambda function: function())
        patch.setattr(decisions, "print_rank0", self.printed.append)
        patch.setattr(decisions, "find_nodes", self.find_nodes)
        patch.setattr(torch.cuda, "get_device_name", lambda _: self.ranks[0][1])
        patch.setattr(torch.distributed, "get_world_size", lambda: len(self.ranks))
        patch.setattr(torch.distributed, "all_gather_object", self.gather)

    def gather(self, places: list, own: tuple) -> None:
        self.num_gathered += 1
        assert own in [rank[:2] for rank in self.ranks] or own[1] == "CPU"
        names = ["CPU" if own[1] == "CPU" else name for _, name, _ in self.ranks]
        places[:] = [(free, name) for (free, _, _), name in zip(self.ranks, names, strict=True)]

    def find_nodes(self) -> list[list[int]]:
        hosts = [host for _, _, host in self.ranks]
        return [[i for i, host in enumerate(hosts) if host == one] for one in dict.fromkeys(hosts)]

    def decide(
        self, recipe: Recipe, device: torch.device = GPU, recorded: dict | None = None
    ) -> dict[str, Any]:
        """Return what is to be recorded; the recipe has the same values."""
        found, record = decide_run(recipe, self.inputs, device, recorded or {})
        assert found.engine == record.get(ENGINE, recipe.engine)
        wanted = record.get(CHECKPOINTING, recipe.train.gradient_checkpointing)
        assert found.train.gradient_checkpointing == wanted
        return record


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    CONFIG.save_pretrained(tmp_path)
    return World(tmp_path, monkeypatch)


def test_the_rank_with_least_memory_and_the_slowest_gpu_decide(world: World, run: ModelRun) -> None:
    assert world.decide(make_recipe()) == {ENGINE: "zero2", CHECKPOINTING: False}
    first, second = world.printed
    assert first.startswith("engine: auto is zero2, by the plan for 9 GiB, the least that is free")
    assert second.startswith("train.gradient_checkpointing: auto is false: without it a step takes")

    # Rank 1 has room for zero2's step with checkpointing alone.
    plain, saving = (
        compare_engines(run, make_recipe(gradient_checkpointing=on), make_machine("H100", 2), 1)
        for on in (False, True)
    )
    room = (plain["fsdp"].peak + saving["zero2"].peak) / 2
    assert saving["zero2"].peak < room < plain["zero2"].peak
    world.ranks[1] = (room / (1 - RESERVE), "NVIDIA H100 80GB HBM3", "a")
    recipe = make_recipe("zero2")
    assert world.decide(recipe) == {CHECKPOINTING: True}
    assert "auto is true: without it a step would take" in world.printed[-1]
    machine = decisions.gather_machine(GPU)
    assert machine.usable == pytest.approx(room)
    assert (machine.node_size, machine.num_nodes) == (2, 1)

    world.ranks[1] = (10 * GIB, "NVIDIA A100-SXM4-40GB", "b")
    machine = decisions.gather_machine(GPU)
    assert (machine.gpu.bf16_tflops, machine.num_nodes) == (312, 2)
    world.ranks[1] = (10 * GIB, "Something New", "b")
    world.decide(make_recipe())
    assert "; Something New is not known, and an H100's rates are taken" in world.printed[-2]


def test_a_resumed_run_takes_again_what_it_was_begun_with(world: World) -> None:
    recorded = {ENGINE: "fsdp", CHECKPOINTING: True, "calibration.memory_gib": 3.0}
    # This machine would choose zero2 without checkpointing.
    assert world.decide(make_recipe(), recorded=recorded) == {ENGINE: "fsdp", CHECKPOINTING: True}
    assert world.printed == [
        "engine: auto stays fsdp, as this run was begun with",
        "train.gradient_checkpointing: auto stays true, as this run was begun with",
    ]
    assert world.num_gathered == 0
    # One that is set is not decided, and one that was never recorded is decided now.
    assert world.decide(make_recipe("zero3"), recorded=recorded) == {CHECKPOINTING: True}
    assert world.decide(make_recipe(gradient_checkpointing=False)) == {ENGINE: "zero2"}
    # More ranks than one process: decided anew, and said.
    recorded = {ENGINE: "single", CHECKPOINTING: True}
    found = world.decide(make_recipe(), recorded=recorded)
    assert found == {ENGINE: "zero2", CHECKPOINTING: True}
    assert "engine: single, as this run was begun with, cannot train it" in world.printed


def test_on_cpus_the_simplest_that_fits_and_no_checkpointing(world: World, run: ModelRun) -> None:
    decided = {ENGINE: "zero2", CHECKPOINTING: False}
    assert world.decide(make_recipe(), CPU) == decided
    assert world.printed[0] == "train.gradient_checkpointing: auto is false on CPUs"
    assert world.printed[1].startswith("engine: auto is zero2, the simplest that fits: ")
    held = compare_engines(run, make_recipe(gradient_checkpointing=False), make_machine("L4", 2), 1)
    least = (held["fsdp"].peak + held["zero2"].peak) / 2
    world.ranks[1] = (least / (1 - RESERVE), "", "a")
    assert world.decide(make_recipe(), CPU) == decided | {ENGINE: "fsdp"}
    world.ranks[1] = (1, "", "a")
    assert world.decide(make_recipe(), CPU)[ENGINE] in ("fsdp", "zero3")
    assert "which takes least, as none fits" in world.printed[-1]
    world.ranks = world.ranks[:1]
    assert world.decide(make_recipe(), CPU) == decided | {ENGINE: "single"}
    # Nothing is estimated, nor measured, for checkpointing alone.
    gathered = world.num_gathered
    assert world.decide(make_recipe("zero3"), CPU) == {CHECKPOINTING: False}
    assert world.decide(make_recipe("zero3", gradient_checkpointing=True), CPU) == {}
    assert world.num_gathered == gathered


def test_a_model_that_is_not_estimated_is_sharded_and_that_is_said(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise NotImplementedError("no fake kernel\nfor this")

    monkeypatch.setattr(decisions, "run_without_numbers", fail)
    assert world.decide(make_recipe()) == {ENGINE: "zero3", CHECKPOINTING: True}
    assert world.printed[0] == (
        "engine: auto is zero3, as there is no estimate: NotImplementedError: no fake kernel for this"
    )
    assert world.decide(make_recipe(compile=True))[ENGINE] == "fsdp"


def test_checkpointing_is_off_and_refused_for_a_base_that_has_none(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    world.ranks = [(1, "NVIDIA H100 80GB HBM3", "a")]  # no step fits
    assert world.decide(make_recipe())[CHECKPOINTING] is False
    first, second = world.printed
    assert (
        first
        == "train.gradient_checkpointing: auto is false, as transformers has none for this base"
    )
    assert "by the plan for " in second
    # An earlier version recorded true, and could not train.
    assert world.decide(make_recipe("fsdp"), recorded={CHECKPOINTING: True}) == {
        CHECKPOINTING: False
    }
    assert world.decide(make_recipe("fsdp", gradient_checkpointing=False)) == {}
    recipe = make_recipe("fsdp", gradient_checkpointing=True)
    for device in (CPU, GPU):
        with pytest.raises(UserError, match=r"^train\.gradient_checkpointing: LlamaForCausalLM"):
            world.decide(recipe, device)
