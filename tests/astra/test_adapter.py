"""astra.adapter: factors leave the model as it is, and an adapter means the same in every form.

Tiny random models on the CPU, compared in logits with plain PEFT. A few seconds.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from astra import adapter, inits, plain_lora, saved_adapter
from astra.eigen import Subspace
from astra.errors import AstraError
from astra.moments import Batch
from astra.targets import find_targets
from astra.weights import TorchWeights
from tests.support.calibration import find_subspaces, make_factor_source

TARGETS = ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]
PLAIN = TorchWeights()
IDS = torch.randint(60, (2, 11), generator=torch.Generator().manual_seed(9))


def make_base(dtype: torch.dtype = torch.float32, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=24,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.double()


def start(
    base: nn.Module, rank: int, alpha: float, select: str
) -> tuple[PeftModel, dict, dict[str, Subspace], float]:
    """Return an Astra adapter on `base`: PEFT's model, its layers, the subspaces, the rounding."""
    model = adapter.attach_adapters(base, TARGETS, rank, alpha, 0.0).eval()
    layers = adapter.get_lora_layers(model)
    batch = Batch(input_ids=IDS, token_mask=torch.ones_like(IDS, dtype=torch.bool))
    with model.disable_adapter():
        subspaces = find_subspaces(
            model, adapter.get_base_layers(layers), [batch], PLAIN, rank=rank, select=select, seed=1
        )
    rounding = adapter.initialise_layers(layers, make_factor_source(subspaces), PLAIN)
    return model, layers, subspaces, rounding


def train_a_bit(layers: dict) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in layers.values():
            for part in (layer.lora_A, layer.lora_B):
                weight = part[adapter.ADAPTER].weight
                weight += (0.2 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)


@pytest.mark.parametrize("select", ["smallest", "largest", "middle", "random"])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 10), (12, 3)])
def test_nothing_moves_at_step_0_for_any_scaling(select: str, rank: int, alpha: float) -> None:
    base = make_base()
    before = logits(base)
    original = {name: p.detach().clone() for name, p in base.named_parameters()}
    model, layers, _, rounding = start(base, rank, alpha, select)
    assert 0 <= rounding < 1e-6  # of fp32
    assert (logits(model) - before).abs().max() < 1e-5 * before.abs().max()
    changed = [
        n
        for n, m in adapter.get_base_layers(layers).items()
        if not torch.equal(m.weight, original[f"{n}.weight"])
    ]
    if select == "largest":  # not passed by B = 0: every A0 and W_res - W is there
        assert len(changed) == len(layers) == 10
    factors = adapter.read_factors(layers, PLAIN)
    for name, (a0, b0) in factors.items():
        wanted = original[f"{name}.weight"].double() - alpha / rank * b0.double() @ a0.double()
        assert torch.equal(layers[name].base_layer.weight, wanted.float())


def test_bf16_residual_is_within_its_rounding() -> None:
    base = make_base(torch.bfloat16)
    model, layers, _, rounding = start(base, 8, 8, "largest")
    assert 0 < rounding <= 2**-8
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert layers["model.layers.0.self_attn.q_proj"].base_layer.weight.dtype == torch.bfloat16


def test_rows_of_a0_are_zero_where_the_weight_does_not_reach_and_not_where_tokens_were_few() -> (
    None
):
    _, layers, subspaces, _ = start(make_base(), 8, 8, "smallest")
    gate = "model.layers.1.mlp.gate_proj"  # 56 outputs of 24 inputs: at least 32 zero eigenvalues
    assert (subspaces[gate].values == 0).all()
    assert not adapter.read_factors(layers, PLAIN)[gate].a.any()
    # 22 tokens span 22 of 24 dimensions: two eigenvalues are zero.
    down = "model.layers.1.mlp.down_proj"
    assert (subspaces[down].values == 0).tolist() == [True] * 2 + [False] * 6
    assert adapter.read_factors(layers, PLAIN)[down].a.any(1).all()


@pytest.mark.parametrize("alpha", [8, 20])
def test_residual_with_adapter_equals_plain_lora_on_the_base_and_its_merge(
    tmp_path: Path, alpha: float
) -> None:
    model, layers, _, _ = start(make_base(), 8, alpha, "largest")
    initial = adapter.read_factors(layers, PLAIN)
    train_a_bit(layers)
    trained = adapter.read_factors(layers, PLAIN)
    reached, original = logits(model), logits(make_base())
    tolerance = 1e-5 * original.abs().max()
    assert (reached - original).abs().max() > 100 * tolerance
    config = model.peft_config[adapter.ADAPTER]
    scaling = plain_lora.get_scaling(config)
    exported = plain_lora.to_plain_lora(trained, initial, scaling)
    plain_lora.save_plain_lora(tmp_path / "lora", config, "base", exported)
    adapter.save_adapter(tmp_path / "adapter", config, "base", trained)
    adapter.save_adapter(tmp_path / "astra_init", config, "base", initial)
    plain = PeftModel.from_pretrained(make_base(), tmp_path / "lora")
    plain_config = plain.peft_config["default"]
    assert (plain_config.r, plain_config.lora_alpha) == (16, 16)
    assert (logits(plain) - reached).abs().max() < tolerance
    assert (logits(plain.merge_and_unload()) - reached).abs().max() < tolerance
    residual = make_base()
    adapter.subtract_initial(residual, *adapter.load_adapter(tmp_path / "astra_init"), PLAIN)
    for name, layer in layers.items():
        assert torch.equal(residual.get_submodule(name).weight, layer.base_layer.weight)
    on_residual = PeftModel.from_pretrained(residual, tmp_path / "adapter")
    assert (logits(on_residual) - reached).abs().max() < tolerance


def test_load_gives_back_what_save_wrote(tmp_path: Path) -> None:
    model, layers, _, _ = start(make_base(), 4, 6, "middle")
    factors = adapter.read_factors(layers, PLAIN)
    adapter.save_adapter(tmp_path, model.peft_config[adapter.ADAPTER], "base", factors)
    again, scaling = adapter.load_adapter(tmp_path)
    assert scaling == 1.5
    assert again.keys() == factors.keys()
    assert all(
        torch.equal(a, b)
        for name in factors
        for a, b in zip(again[name], factors[name], strict=True)
    )


def test_targets_that_cannot_be_adapted_are_named() -> None:
    with pytest.raises(
        AstraError, match=r"'qproj' matches no module; linear modules here: .*q_proj"
    ):
        find_targets(make_base(), ["q_proj", "qproj"])
    with pytest.raises(AstraError, match="lm_head is tied") as error:
        find_targets(make_base(), ["lm_head"])
    assert error.value.subject == "targets"
    with pytest.raises(AstraError, match="is a LlamaMLP, not a linear layer"):
        find_targets(make_base(), ["mlp"])
    with pytest.raises(AstraError, match=r"13 is above the smaller side, 12, of .*k_proj") as error:
        adapter.attach_adapters(make_base(), ["q_proj", "k_proj"], 13, 13, 0.0)
    assert error.value.subject == "rank"
    assert list(find_targets(make_base(tied=False), ["lm_head"])) == ["lm_head"]


def test_plain_lora_draws_from_seed_and_name() -> None:
    weight = torch.zeros(6, 25)
    a, b = inits.init_lora(weight, 4, 1, "m")
    assert (a.shape, b.shape) == ((4, 25), (6, 4))
    assert not b.any()
    assert 0.15 < a.abs().max() <= 0.2  # uniform in +-1 / sqrt(25)
    assert torch.equal(a, inits.init_lora(weight, 4, 1, "m")[0])
    assert not torch.equal(a, inits.init_lora(weight, 4, 1, "n")[0])
    assert not torch.equal(a, inits.init_lora(weight, 4, 2, "m")[0])


ARCHITECTURES = {
    "opt": {"hidden_size": 24, "ffn_dim": 40, "num_attention_heads": 4, "word_embed_proj_dim": 24},
    "qwen2": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "gemma2": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "sliding_window": 4,
    },
    "gpt_neox": {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4},
    "phi": {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4},
}
LINEARS = {
    "opt": ["q_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "qwen2": TARGETS,
    "gemma2": TARGETS,
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "phi": ["q_proj", "dense", "fc1", "fc2"],
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_causal_lm_with_linear_layers_can_be_calibrated_and_does_not_move(
    architecture: str,
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=60,
        num_hidden_layers=2,
        max_position_embeddings=32,
        **ARCHITECTURES[architecture],
    )
    base = AutoModelForCausalLM.from_config(config).eval()
    before = logits(base)
    model = adapter.attach_adapters(base, LINEARS[architecture], 4, 4, 0.0).eval()
    layers = adapter.get_lora_layers(model)
    batch = Batch(input_ids=IDS, token_mask=torch.ones_like(IDS, dtype=torch.bool))
    with model.disable_adapter():
        linears = adapter.get_base_layers(layers)
        subspaces = find_subspaces(model, linears, [batch], PLAIN, rank=4, select="largest", seed=1)
    adapter.initialise_layers(layers, make_factor_source(subspaces), PLAIN)
    assert len(layers) == 2 * len(LINEARS[architecture])
    assert all(factors.a.any() for factors in adapter.read_factors(layers, PLAIN).values())
    assert (logits(model) - before).abs().max() < 1e-5 * before.abs().max()


@pytest.mark.parametrize("select", ["smallest", "largest", "middle", "random"])
@pytest.mark.parametrize(("rank", "alpha"), [(8, 8), (4, 10)])
def test_the_bf16_residual_is_rounded_once_from_the_stored_factors_and_rebuilt_bit_for_bit(
    select: str, rank: int, alpha: float, tmp_path: Path
) -> None:
    base = make_base(torch.bfloat16)
    original = {name: p.detach().clone() for name, p in base.named_parameters()}
    model, layers, _, rounding = start(base, rank, alpha, select)
    factors, scaling, worst = adapter.read_factors(layers, PLAIN), alpha / rank, 0.0
    for name, (a0, b0) in factors.items():
        weight, residual = original[f"{name}.weight"].double(), layers[name].base_layer.weight
        product = scaling * b0.double() @ a0.double()
        assert torch.equal(residual, (weight - product).bfloat16()), name
        worst = max(worst, ((product + residual.double() - weight).norm() / weight.norm()).item())
    assert rounding == pytest.approx(
        worst, rel=1e-9
    )  # the reported figure is the largest, recomputed
    assert rounding <= 2**-8
    adapter.save_adapter(tmp_path, model.peft_config[adapter.ADAPTER], "base", factors)
    rebuilt = make_base(torch.bfloat16)
    adapter.subtract_initial(rebuilt, *adapter.load_adapter(tmp_path), PLAIN)
    for name, layer in layers.items():
        assert torch.equal(rebuilt.get_submodule(name).weight, layer.base_layer.weight), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_lora_leaves_the_base_as_it_is(dtype: torch.dtype) -> None:
    base = make_base(dtype)
    before, original = (
        logits(base),
        {name: p.detach().clone() for name, p in base.named_parameters()},
    )
    model = adapter.attach_adapters(base, TARGETS, 4, 10, 0.0).eval()
    layers = adapter.get_lora_layers(model)
    rounding = adapter.initialise_layers(
        layers, lambda name, weight: inits.init_lora(weight, 4, 1, name), PLAIN
    )
    assert rounding == 0
    assert torch.equal(logits(model), before)
    assert all(
        torch.equal(m.weight, original[f"{n}.weight"])
        for n, m in adapter.get_base_layers(layers).items()
    )
    assert all(a.any() and not b.any() for a, b in adapter.read_factors(layers, PLAIN).values())


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 10)])
def test_what_is_saved_names_its_base_and_keeps_its_scaling(
    rank: int, alpha: float, tmp_path: Path
) -> None:
    model, layers, _, _ = start(make_base(), rank, alpha, "largest")
    config = model.peft_config[adapter.ADAPTER]
    adapter.save_adapter(tmp_path, config, "owner/base", adapter.read_factors(layers, PLAIN))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (rank, alpha)
    assert written["base_model_name_or_path"] == "owner/base"
    # A data-driven initialisation would make PEFT change the base.
    assert written["init_lora_weights"] is True
    assert adapter.load_adapter(tmp_path)[1] == alpha / rank


def test_targets_match_whole_last_parts_of_names_in_the_models_order() -> None:
    base = make_base()
    found = list(
        find_targets(
            base, ["up_proj", "self_attn.q_proj", "q_proj", "model.layers.1.mlp.down_proj"]
        )
    )
    assert found == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    with pytest.raises(AstraError, match="proj"):
        find_targets(base, ["proj"])  # a part of a part is no match
    assert (
        list(
            adapter.get_lora_layers(
                adapter.attach_adapters(base, ["up_proj", "q_proj"], 12, 12, 0.0)
            )
        )
        == found[:4]
    )


def test_only_the_factors_can_be_trained() -> None:
    model = adapter.attach_adapters(make_base(), TARGETS, 4, 4, 0.0)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * len(TARGETS)
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)


def test_dora_on_a_bf16_base_starts_at_it() -> None:
    model = adapter.attach_adapters(make_base(torch.bfloat16), TARGETS, 4, 10, 0.0, dora=True)
    layers = adapter.get_lora_layers(model)
    adapter.initialise_layers(
        layers, lambda name, weight: inits.init_lora(weight, 4, 1, name), PLAIN
    )
    for name, norms in adapter.read_magnitudes(layers, PLAIN).items():
        weight = layers[name].base_layer.weight.double()
        torch.testing.assert_close(norms, weight.norm(dim=1).float())  # to fp32's rounding
    # To the bit: PEFT adds (m / |W| - 1) W x, and that ratio is 1.
    assert torch.equal(logits(model.eval()), logits(make_base(torch.bfloat16)))


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_the_same_values_in_pefts_own_layers_give_the_same_logits(
    method: str, tmp_path: Path
) -> None:
    variant = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}[method]
    model = adapter.attach_adapters(
        make_base(), TARGETS, 4, 10, 0.0, rslora=method == "rslora", dora=method == "dora"
    ).eval()
    layers = adapter.get_lora_layers(model)
    adapter.initialise_layers(
        layers, lambda name, weight: inits.init_lora(weight, 4, 1, name), PLAIN
    )
    original = logits(make_base())
    assert torch.equal(
        logits(model), original
    )  # DoRA's magnitudes are the norms that its forward pass finds
    train_a_bit(layers)
    for layer in layers.values():
        for vector in layer.lora_magnitude_vector.values():
            vector.weight.data *= torch.linspace(0.8, 1.3, len(vector.weight))
    reached = logits(model)
    tolerance = 1e-5 * original.abs().max()
    assert (reached - original).abs().max() > 100 * tolerance
    factors, magnitudes = (
        adapter.read_factors(layers, PLAIN),
        adapter.read_magnitudes(layers, PLAIN),
    )
    adapter.save_adapter(tmp_path, model.peft_config[adapter.ADAPTER], "base", factors, magnitudes)

    config = LoraConfig(r=4, lora_alpha=10, target_modules=TARGETS, **variant)
    fresh = get_peft_model(make_base(), config)
    loaded = set_peft_model_state_dict(fresh, load_file(tmp_path / "adapter_model.safetensors"))
    assert not loaded.unexpected_keys
    assert (logits(fresh.eval()) - reached).abs().max() < tolerance
    plain = PeftModel.from_pretrained(make_base(), tmp_path)
    assert (logits(plain) - reached).abs().max() < tolerance
    assert (logits(plain.merge_and_unload()) - reached).abs().max() < tolerance
    with torch.device("meta"):
        saved = saved_adapter.read_saved_adapter(tmp_path, make_base(), sharded=True)
    ours = saved_adapter.attach_saved_adapter(make_base(), saved)
    saved_adapter.write_saved_adapter(ours, saved, PLAIN)
    assert (logits(ours.eval()) - reached).abs().max() < tolerance
    scaling = {"lora": 2.5, "rslora": 5.0, "dora": 2.5}[method]
    assert (
        adapter.load_adapter(tmp_path)[1]
        == scaling
        == next(iter(layers.values())).scaling[adapter.ADAPTER]
    )
