"""launch.planning.budget: `calibration.memory_gib: auto` becomes a limit that fits, once.

Simulated: the free memory, and a world of one rank without a process group. A few seconds.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma3nTextConfig, Inkling2TextConfig, LlamaConfig, PretrainedConfig

from astra.errors import AstraError
from launch.calibration.store import MANIFEST, UNFINISHED
from launch.config.loading import validate_recipe
from launch.config.schema import Recipe
from launch.data.token_set import make_text_set
from launch.planning import budget
from launch.planning.budget import FIELD, decide_memory
from launch.planning.estimate import estimate_calibration_needs
from launch.planning.machine import RESERVE
from launch.runtime.units import GIB

CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
# Models of which a layer depends on earlier ones not through its hidden states alone, or only beside.
SHARED_KEYS = Gemma3nTextConfig(
    **TEXT,
    intermediate_size=48,
    layer_types=["sliding_attention", "full_attention"] * 2,
    num_kv_shared_layers=2,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=300,
    laurel_rank=4,
    altup_num_inputs=2,
    activation_sparsity_pattern=None,
)
OWN_KEYS = Gemma3nTextConfig(**SHARED_KEYS.to_dict() | {"num_kv_shared_layers": 0})
BLOCK_STATES = Inkling2TextConfig(
    **TEXT,
    unpadded_vocab_size=300,
    swa_num_attention_heads=4,
    swa_num_key_value_heads=2,
    swa_head_dim=8,
    sliding_window_size=16,
    d_rel=4,
    rel_extent=16,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_layers_per_attn_res_block=2,
    layer_types=["hybrid_sliding", "hybrid"] * 2,
)
CPU = torch.device("cpu")
LENGTH = 16  # tokens of every row, fewer than data.max_length


class World:
    """A single rank with some free memory, and what it printed."""

    def __init__(self, model: Path, patch: pytest.MonkeyPatch) -> None:
        self.free, self.printed = 0, []
        checked = SimpleNamespace(head_parameters=())
        rows = make_text_set([[1] * LENGTH] * 10)
        self.inputs = SimpleNamespace(
            model_path=model,
            dtype=torch.float32,
            head=None,
            model=checked,
            calibration=SimpleNamespace(tokens=rows),
            data={},
        )
        patch.setattr(budget, "measure_free_memory", lambda _: self.free)
        patch.setattr(budget, "all_reduce_max", lambda value, _: value)
        patch.setattr(budget, "run_on_rank0", lambda function: function())
        patch.setattr(budget, "print_rank0", self.printed.append)
        patch.setattr(torch.distributed, "get_world_size", lambda: 1)

    def decide(self, recipe: Recipe, folder: Path) -> tuple[float | str | None, dict]:
        """Return the recipe's limit after the decision, and what is to be recorded."""
        decided, record = decide_memory(recipe, self.inputs, CPU, folder)
        return decided.calibration.memory_gib, record


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    CONFIG.save_pretrained(tmp_path / "model")
    return World(tmp_path / "model", monkeypatch)


def make_recipe(**sections: dict) -> Recipe:
    values = {
        "model": {"name": "m"},
        "data": {"path": "d", "max_length": 128},
        "adapter": {"rank": 4},
        "calibration": {"samples": 10},
        "engine": "single",
    }
    for name, fields in sections.items():
        values[name] = values.get(name, {}) | fields
    return validate_recipe(values)


def write_record(folder: Path, name: str, **conditions: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"conditions": conditions}))


@pytest.mark.parametrize("method", ["astra", "lora_ga", "eva"])
def test_windows_fit_beside_the_model_and_a_pass(method: str, world: World, tmp_path: Path) -> None:
    recipe = make_recipe(adapter={"method": method})
    needs = estimate_calibration_needs(CONFIG, recipe, torch.float32, 1)
    whole = needs.batch.plan_windows(None)
    taken = needs.taken_bytes + needs.batch.hidden_states
    # Room for the model, a pass and half of the sums.
    world.free = int((taken + whole.peak_bytes - whole.windows[0].sums_bytes / 2) / (1 - RESERVE))
    value, record = world.decide(recipe, tmp_path / "calibration")
    assert record == {FIELD: value}
    plan = needs.batch.plan_windows(value)
    assert len(plan.windows) >= 2
    assert plan.peak_bytes + taken <= (1 - RESERVE) * world.free + 1
    assert value * GIB == pytest.approx((1 - RESERVE) * world.free - taken, abs=1)
    (line,) = world.printed
    assert line.startswith(f"{FIELD}: auto is {value:.3g} GiB on each rank: ")
    world.free = 10 * GIB
    value, _ = world.decide(recipe, tmp_path / "calibration")
    assert len(needs.batch.plan_windows(value).windows) == 1


def test_what_was_begun_keeps_its_limit_while_it_fits(world: World, tmp_path: Path) -> None:
    recipe, folder = make_recipe(), tmp_path / "calibration"
    world.free = 2 * GIB
    first, _ = world.decide(recipe, folder)
    write_record(folder, UNFINISHED, memory_gib=first)
    for free in (20 * GIB, 1.95 * GIB):  # in the second the reserve makes up for it
        world.free = free
        assert world.decide(recipe, folder) == (first, {FIELD: first})
        assert world.printed[-1] == f"{FIELD}: auto stays {first:.3g} GiB, as it was begun with"
    world.free = GIB
    value, record = world.decide(recipe, folder)
    assert value < first
    assert record == {FIELD: value}
    assert f"as {first:.3g} GiB no longer fits" in world.printed[-1]
    write_record(folder, UNFINISHED, memory_gib=None)
    assert world.decide(recipe, folder) == (None, {FIELD: None})


def test_a_calibration_of_a_version_without_the_record_is_decided_anew(
    world: World, tmp_path: Path
) -> None:
    folder = tmp_path / "calibration"
    write_record(folder, UNFINISHED, world_size=1)
    world.free = 2 * GIB
    value, _ = world.decide(make_recipe(), folder)
    assert 1 < value < 2


def test_a_finished_calibration_is_not_decided_again(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "calibration"
    write_record(folder, MANIFEST, memory_gib=0.25)
    assert world.decide(make_recipe(), folder) == ("auto", {FIELD: 0.25})
    write_record(folder, MANIFEST, world_size=1)
    assert world.decide(make_recipe(), folder) == ("auto", {})
    assert world.printed == []


@pytest.mark.parametrize(
    ("sections", "value"),
    [
        ({"calibration": {"memory_gib": 3}}, 3.0),
        ({"calibration": {"memory_gib": None}}, None),
        ({"adapter": {"method": "lora"}}, "auto"),
        ({"calibration": {"path": "elsewhere"}}, "auto"),
    ],
    ids=["number", "null", "no calibration", "made elsewhere"],
)
def test_what_is_set_or_not_needed_is_left(
    sections: dict, value: object, world: World, tmp_path: Path
) -> None:
    assert world.decide(make_recipe(**sections), tmp_path / "calibration") == (value, {})
    assert world.printed == []


def test_a_model_that_is_not_estimated_has_no_limit_and_that_is_said(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise NotImplementedError("no fake kernel\nfor this")

    monkeypatch.setattr(budget, "estimate_calibration_needs", fail)
    world.free = GIB
    assert world.decide(make_recipe(), tmp_path / "calibration") == (None, {FIELD: None})
    assert world.printed == [
        f"{FIELD}: auto is no limit, as there is no estimate: NotImplementedError: no fake kernel "
        "for this"
    ]


def test_too_little_memory_is_refused_when_windows_are_planned(
    world: World, tmp_path: Path
) -> None:
    world.free = 2**20
    value, _ = world.decide(make_recipe(), tmp_path / "calibration")
    assert value == 0
    needs = estimate_calibration_needs(CONFIG, make_recipe(), torch.float32, 1)
    with pytest.raises(AstraError, match=r"0 GiB is below the .* GiB that one layer") as error:
        needs.batch.plan_windows(value)
    assert error.value.subject == "memory"


def test_targets_that_the_model_lacks_are_named_at_once(world: World, tmp_path: Path) -> None:
    world.free = GIB
    recipe = make_recipe(adapter={"targets": ["no_proj"]})
    with pytest.raises(AstraError, match="no_proj") as error:
        world.decide(recipe, tmp_path / "calibration")
    assert error.value.subject == "targets"


@pytest.mark.parametrize(
    ("config", "target", "can_split"),
    [
        (SHARED_KEYS, "q_proj", False),
        (OWN_KEYS, "q_proj", True),
        (BLOCK_STATES, "q_proj", False),
        (CONFIG, "lm_head", False),
    ],
    ids=["shared keys and values", "own keys and values", "states of blocks", "the head"],
)
def test_a_model_runs_in_windows_only_if_its_layers_hand_on_one_tensor(
    config: PretrainedConfig, target: str, can_split: bool, world: World, tmp_path: Path
) -> None:
    config.save_pretrained(world.inputs.model_path)
    world.inputs.dtype, world.free = torch.bfloat16, GIB
    folder, adapter = tmp_path / "calibration", {"targets": [target]}
    value, _ = world.decide(make_recipe(adapter=adapter), folder)
    assert (value is not None) == can_split
    if not can_split:
        assert world.printed == [f"{FIELD}: auto is no limit, as this model cannot run in windows"]
    needed = make_recipe(adapter=adapter, calibration={"memory_gib": 1e-9})
    enough = make_recipe(adapter=adapter, calibration={"memory_gib": 1})
    assert world.decide(enough, folder) == (1, {})
    if can_split:
        assert world.decide(needed, folder) == (1e-9, {})
        return
    with pytest.raises(AstraError, match=r"; set no limit$") as error:
        world.decide(needed, folder)
    assert error.value.subject == "memory"
    write_record(folder, MANIFEST)
    assert world.decide(needed, folder) == (1e-9, {})


def test_a_limit_is_checked_for_the_lengths_of_the_samples(world: World, tmp_path: Path) -> None:
    peaks, target = [], {"targets": ["lm_head"]}  # cannot run in windows
    for length in (LENGTH, 2048):
        recipe = make_recipe(data={"max_length": length}, adapter=target)
        needs = estimate_calibration_needs(CONFIG, recipe, torch.float32, 1)
        peaks.append(needs.batch.plan_windows(None).peak_bytes / GIB)
    limit = sum(peaks) / 2
    assert peaks[0] < limit < peaks[1]
    settings = {"data": {"max_length": 2048}, "calibration": {"memory_gib": limit}}
    recipe = make_recipe(adapter=target, **settings)
    assert world.decide(recipe, tmp_path / "calibration") == (limit, {})
