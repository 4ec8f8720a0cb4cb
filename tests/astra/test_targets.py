"""Targets name the modules that their words mean, and what PEFT loads again is the same set.

Proves that ends of names and all-linear stay within the text decoder, that full names and patterns
reach every module, that exclusions take modules out, that fused experts are told, and that what
cannot have an adapter is refused with a remedy. Needs nothing. About 3 s.
"""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from astra.adapter import attach_adapters, get_lora_layers
from astra.errors import AstraError
from astra.targets import (
    ALL_LINEAR,
    abbreviate_name,
    find_targets,
    make_peft_targets,
    match_targets,
)
from launch.config.loading import read_recipe
from launch.config.schema import Adapter
from launch.training.trainable import check_and_describe_trainable
from tests.support.architectures import CONFIGS, make_model

DEFAULT = Adapter().targets
TOWER = "model.vision_tower."
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def make_empty(name: str) -> PreTrainedModel:
    """Make a model without storage."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIGS[name]())


def find_by_peft(name: str, targets: object) -> set[str]:
    """Return the modules that plain PEFT adapts."""
    config = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    return set(get_lora_layers(get_peft_model(make_empty(name), config)))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "qwen2_moe", "gpt_oss"])
def test_all_linear_is_what_peft_means(name: str) -> None:
    linears = find_targets(make_empty(name), [ALL_LINEAR])
    assert set(linears) == find_by_peft(name, ALL_LINEAR)
    assert "lm_head" not in linears


@pytest.mark.parametrize("targets", [DEFAULT, [ALL_LINEAR]], ids=["default", "all-linear"])
def test_a_vision_tower_is_left_out_and_named(targets: list[str]) -> None:
    model = make_empty("gemma3")
    linears, skipped = match_targets(model, targets)
    assert len(linears) == 14  # 7 in each of 2 layers
    assert all(name.startswith("model.language_model.") for name in linears)
    in_tower = {name for name in skipped if name.startswith(TOWER)}
    assert f"{TOWER}encoder.layers.0.self_attn.k_proj" in {
        name.replace("vision_model.", "") for name in in_tower
    }
    assert {skipped[name] for name in in_tower} == {"outside of the text decoder"}


def test_full_names_and_patterns_reach_the_tower() -> None:
    model = make_empty("gemma3")
    names = [name for name, _ in model.named_modules() if name.endswith("self_attn.k_proj")]
    in_tower = [name for name in names if name.startswith(TOWER)]
    assert len(in_tower) == 2
    assert list(find_targets(model, [in_tower[1]])) == [in_tower[1]]
    assert list(find_targets(model, [f"{TOWER}*.k_proj"])) == in_tower
    assert set(find_targets(model, ["k_proj", f"{TOWER}*.k_proj"])) == set(names)
    message = (
        r"^'fc1' names modules outside of the text decoder only, such as .*pattern, '\*\.fc1'$"
    )
    with pytest.raises(AstraError, match=message) as error:
        find_targets(model, ["q_proj", "fc1"])
    assert error.value.subject == "targets"
    assert len(find_targets(model, ["*.layers.*.fc1"])) == 2


@pytest.mark.parametrize(
    ("targets", "exclude", "wanted"),
    [
        (["model.layers.1.*"], [], r"model\.layers\.1\..*_proj"),
        (["model.layers.[0]*.mlp.*"], [], r"model\.layers\.0\.mlp\..*_proj"),
        (["*.?_proj"], [], r".*\.[qkvo]_proj"),
        (["self_attn.q_proj", "model.layers.0.mlp.up_proj"], [], r".*\.q_proj|.*\.0\.mlp\.up_proj"),
        (ATTENTION, ["k_proj"], r".*\.[qvo]_proj"),
        (ATTENTION, ["model.layers.0.*"], r".*\.1\..*\.[qkvo]_proj"),
        ([ALL_LINEAR], ["down_proj", "self_attn.o_proj"], r".*\.([qkv]|gate|up)_proj"),
        ([ALL_LINEAR], ["model.layers.1.mlp.up_proj"], r"(?!.*\.1\.mlp\.up_proj).*_proj"),
        (["lm_head"], [], "lm_head"),
    ],
)
def test_words_name_modules(targets: list[str], exclude: list[str], wanted: str) -> None:
    model = make_empty("llama")
    found = list(find_targets(model, targets, exclude))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert found == [name for name in linear if re.fullmatch(wanted, name)]
    assert found


@pytest.mark.parametrize(
    ("name", "targets", "exclude", "message"),
    [
        (
            "llama",
            ["*.query"],
            [],
            r"'\*\.query' matches no module; linear modules here: down_proj",
        ),
        ("llama", ["proj"], [], "'proj' matches no module"),
        ("llama", ["*norm"], [], r"'\*norm' matches no module"),
        ("llama", ["embed_tokens"], [], "model.embed_tokens is a Embedding, not a linear layer"),
        ("qwen2", ["lm_head"], [], "lm_head is tied to another module; leave it out"),
        (
            "gpt2",
            ["c_attn"],
            [],
            r"transformer\.h\.0\.attn\.c_attn is a Conv1D, not a linear layer; leave it out",
        ),
        ("gpt2", [ALL_LINEAR], [], "'all-linear' matches no module"),
        (
            "mixtral",
            DEFAULT,
            [],
            r"'gate_proj' matches no module, only the fused tensor model\.layers\.0\.mlp\.experts"
            r"\.gate_up_proj, which can have no adapter; linear modules here: k_proj, lm_head, o_proj",
        ),
        ("llama", ["q_proj"], ["qproj"], "'qproj' matches no module; correct it or leave it out"),
        ("llama", ["q_proj"], ["q_proj"], "every module that the targets name is excluded"),
        ("llama", [ALL_LINEAR], [ALL_LINEAR], "every module that the targets name is excluded"),
    ],
)
def test_what_names_no_module_is_refused(
    name: str, targets: list[str], exclude: list[str], message: str
) -> None:
    with pytest.raises(AstraError, match=f"^{message}"):
        find_targets(make_empty(name), targets, exclude)


def test_a_tied_head_is_left_out_where_others_bear_the_name() -> None:
    linears, skipped = match_targets(make_empty("qwen2"), ["q_proj", "*"])
    assert "lm_head" not in linears
    assert skipped == {"lm_head": "tied to another module"}


def test_fused_experts_are_named() -> None:
    linears, skipped = match_targets(make_empty("qwen2_moe"), DEFAULT)
    assert "model.layers.0.mlp.shared_expert.up_proj" in linears
    assert skipped == {
        f"model.layers.{layer}.mlp.experts.{name}": "matrices of all experts in one tensor"
        for layer in (0, 1)
        for name in ("gate_up_proj", "down_proj")
    }
    assert not match_targets(make_empty("qwen2_moe"), ATTENTION).skipped
    assert not match_targets(make_empty("qwen2_moe"), DEFAULT, ["*.experts.*"]).skipped


def test_names_that_peft_takes_for_fused_experts_are_left_out() -> None:
    """With target_modules=[gate_proj, ...] PEFT adapts the experts, and not these modules."""
    linears, skipped = match_targets(make_empty("deepseek_v3"), [ALL_LINEAR])
    assert {name.rsplit(".", 1)[-1] for name in linears} == {
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    }
    reason = "named like the fused experts, which PEFT would adapt instead"
    assert skipped["model.layers.0.mlp.gate_proj"] == reason
    assert skipped["model.layers.1.mlp.shared_experts.down_proj"] == reason
    with pytest.raises(AstraError, match=f"^model.layers.0.mlp.up_proj is {reason}; leave it out"):
        find_targets(make_empty("deepseek_v3"), ["o_proj", "up_proj"])


@pytest.mark.parametrize(
    ("name", "targets", "exclude", "as_given"),
    [
        ("llama", DEFAULT, [], True),
        ("gemma3", DEFAULT, [], False),
        ("gemma3", [f"{TOWER}*"], [], False),
        ("llama", ["model.layers.1.*", "k_proj"], ["up_proj"], False),
        ("qwen2_moe", [ALL_LINEAR], ["shared_expert_gate"], False),
        ("mixtral", ATTENTION, [], True),
        ("deepseek_v3", [ALL_LINEAR], [], False),
    ],
)
def test_peft_adapts_the_same_modules(
    name: str, targets: list[str], exclude: list[str], as_given: bool, tmp_path: Path
) -> None:
    model = attach_adapters(make_model(name), targets, 2, 2, 0.0, exclude=exclude)
    wanted = set(find_targets(make_empty(name), targets, exclude))
    assert set(get_lora_layers(model)) == wanted
    model.save_pretrained(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    assert (set(config.target_modules) == set(targets)) == as_given
    assert find_by_peft(name, config.target_modules) == wanted


def test_a_name_that_ends_another_is_a_regular_expression() -> None:
    model = nn.ModuleDict({"up": nn.Linear(2, 2), "in": nn.ModuleDict({"up": nn.Linear(2, 2)})})
    assert make_peft_targets(model, ["up"], ["up", "in.up"]) == ["up"]
    assert make_peft_targets(model, ["in.*"], ["in.up"]) == ["in.up"]
    assert make_peft_targets(model, ["u*"], ["up"]) == "up"


def test_what_peft_refuses_is_one_line_with_a_remedy() -> None:
    message = (
        r"^PEFT refuses it: .*Module 'out_proj' is incompatible.*; leave out_proj out, or excl"
    )
    with pytest.raises(AstraError, match=message) as error:
        attach_adapters(make_empty("falcon_h1"), ["q_proj", "in_proj", "out_proj"], 2, 2, 0.0)
    assert error.value.subject == "targets"
    assert "\n" not in str(error.value)
    model = attach_adapters(make_empty("falcon_h1"), [ALL_LINEAR], 2, 2, 0.0, exclude=["out_proj"])
    assert not any(name.endswith("out_proj") for name in get_lora_layers(model))


def test_numbers_in_names_are_abbreviated() -> None:
    assert abbreviate_name("model.layers.12.mlp.experts.3.w1") == "model.layers.*.mlp.experts.*.w1"
    assert abbreviate_name("h.0") == "h.*"


def test_a_run_says_what_it_adapts() -> None:
    config = CONFIGS["qwen2_moe"]()
    text = check_and_describe_trainable(config, Adapter(rank=2, alpha=2))
    first, second = text.splitlines()
    assert re.match(
        r"adapted: 14 modules \(q_proj, .*, down_proj\) with [\d,]+ parameters, ", first
    )
    assert second == (
        "not adapted, though a target names it: model.layers.*.mlp.experts.gate_up_proj (2, matrices "
        "of all experts in one tensor); model.layers.*.mlp.experts.down_proj (2, matrices of all "
        "experts in one tensor)"
    )
    whole = check_and_describe_trainable(config, Adapter(method="full"))
    assert re.fullmatch(r"trained: all [\d,]+ parameters", whole)
    with pytest.raises(AstraError, match="33 is above the smaller side"):
        check_and_describe_trainable(config, Adapter(rank=33))


@pytest.mark.parametrize("value", ["all-linear", "[all-linear]"])
def test_one_word_is_a_list_of_one(value: str) -> None:
    settings = [f"adapter.targets={value}", "adapter.exclude=down_proj"]
    adapter = read_recipe("metamath", settings).adapter
    assert (adapter.targets, adapter.exclude) == ([ALL_LINEAR], ["down_proj"])
