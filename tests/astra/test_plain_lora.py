"""astra.plain_lora: one rank, scale 1, the same scale in every loader; and the cut to a smaller rank.

The rules of PEFT, vLLM and llama.cpp are each written down from their sources. A second.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from astra import adapter, plain_lora
from astra.adapter import Factors

TARGETS = ["q_proj", "k_proj", "down_proj"]


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=24,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def draw_factors(ranks: dict[str, int], seed: int) -> dict[str, Factors]:
    """Return random factors for the targets of `make_base`, of each target's rank."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, linear in adapter.find_targets(make_base(), list(ranks)).items():
        rank = ranks[name.rsplit(".", 1)[-1]]
        a = torch.randn(rank, linear.in_features, generator=generator)
        factors[name] = Factors(a, torch.randn(linear.out_features, rank, generator=generator))
    return factors


def multiply(factors: Factors) -> Tensor:
    return factors.b.double() @ factors.a.double()


def compute_scale_in_peft(config: dict, _rows: int) -> float:
    """Compute the scale of a module without a pattern of its own.

    Source: huggingface/peft, src/peft/tuners/lora/layer.py, LoraLayer.update_layer (0.21.2).
    """
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    divisor = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    return config["lora_alpha"] / divisor


def compute_scale_in_vllm(config: dict, _rows: int) -> float:
    """Compute the scale as vLLM does, which reads no patterns at all and refuses two fields.

    Source: vllm-project/vllm, vllm/lora/peft_helper.py, PEFTHelper: lora_alpha / r, or over sqrt(r)
    with use_rslora; it raises where modules_to_save or use_dora is set.
    """
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    divisor = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    return config["lora_alpha"] / divisor


def compute_scale_in_llama_cpp(config: dict, rows: int) -> float:
    """Compute the scale as llama.cpp does: alpha over the rows of the module's own A.

    Sources: ggml-org/llama.cpp, convert_lora_to_gguf.py, which writes lora_alpha and neither r,
    patterns nor use_rslora; src/llama-adapter.h, llama_adapter_lora_weight::get_scale, which takes
    alpha / rank with the rank of the tensor, and 1 where alpha is 0.
    """
    return config["lora_alpha"] / rows if config["lora_alpha"] else 1.0


LOADERS = [compute_scale_in_peft, compute_scale_in_vllm, compute_scale_in_llama_cpp]


@pytest.mark.parametrize("on_residual", [False, True])
@pytest.mark.parametrize(
    ("ranks", "rslora"),
    [
        ({"q_proj": 4, "k_proj": 4, "down_proj": 4}, False),
        ({"q_proj": 2, "k_proj": 3, "down_proj": 7}, False),
        ({"q_proj": 8, "k_proj": 8, "down_proj": 8}, True),
    ],
)
def test_every_loader_computes_the_change_that_was_trained(
    ranks: dict[str, int], rslora: bool, on_residual: bool, tmp_path: Path
) -> None:
    trained, first = draw_factors(ranks, 1), draw_factors(ranks, 2)
    patterns = {"rank_pattern": ranks, "alpha_pattern": {"q_proj": 3}}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=rslora, **patterns)
    scaling = plain_lora.get_scaling(config)
    assert scaling == (3.0 if rslora else 1.5)
    initial = first if on_residual else {}
    exported = plain_lora.to_plain_lora(trained, initial, scaling)
    plain_lora.save_plain_lora(tmp_path, config, "base", exported)

    written = json.loads((tmp_path / "adapter_config.json").read_text())
    rank = max(ranks.values()) * (2 if on_residual else 1)
    assert (written["r"], written["lora_alpha"]) == (rank, rank)
    assert not written["rank_pattern"]
    assert not written["alpha_pattern"]
    assert not written["use_rslora"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, factors in trained.items():
        stem = f"base_model.model.{name}.lora_"
        found = Factors(tensors[f"{stem}A.weight"], tensors[f"{stem}B.weight"])
        assert len(found.a) == found.b.shape[1] == rank
        wanted = scaling * multiply(factors)
        if on_residual:
            wanted -= scaling * multiply(initial[name])
        for compute_scale in LOADERS:
            scale = compute_scale(written, len(found.a))
            assert scale == 1.0
            # 2^-24 relative for each entry of B that was rounded; sums of 14 terms.
            assert (scale * multiply(found) - wanted).norm() < 1e-6 * wanted.norm()


def test_the_change_in_plain_peft_is_the_one_that_was_trained(tmp_path: Path) -> None:
    ranks = {"q_proj": 2, "k_proj": 3, "down_proj": 7}
    trained, initial = draw_factors(ranks, 1), draw_factors(ranks, 2)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)
    exported = plain_lora.to_plain_lora(trained, initial, 1.5)
    plain_lora.save_plain_lora(tmp_path, config, "base", exported)
    merged = PeftModel.from_pretrained(make_base(), tmp_path).merge_and_unload()
    base = make_base()
    for name in trained:
        change = merged.get_submodule(name).weight - base.get_submodule(name).weight
        wanted = 1.5 * (multiply(trained[name]) - multiply(initial[name]))
        assert (change.double() - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize("scaling", [0.5, 1.0, 4.0])
def test_a_scale_that_is_a_power_of_two_is_folded_without_rounding(scaling: float) -> None:
    trained, initial = draw_factors({"q_proj": 4}, 1), draw_factors({"q_proj": 4}, 2)
    for name, (a, b) in plain_lora.to_plain_lora(trained, initial, scaling).items():
        assert torch.equal(a, torch.cat([trained[name].a, initial[name].a]))
        assert torch.equal(
            b.double() / scaling,
            torch.cat([trained[name].b, -initial[name].b], 1).double(),
        )


def test_any_other_scale_is_rounded_once() -> None:
    trained = draw_factors({"q_proj": 4}, 1)
    for name, (_, b) in plain_lora.to_plain_lora(trained, {}, 1 / 3).items():
        assert torch.equal(b, (1 / 3 * trained[name].b.double()).float())


def test_before_any_training_there_is_no_change_at_all() -> None:
    """B A - B0 A0 is 0 if B = B0 and A = A0."""
    initial = draw_factors({"q_proj": 4}, 1)
    for name, factors in plain_lora.to_plain_lora(initial, initial, 1.5).items():
        assert (len(factors.a), factors.b.shape[1]) == (8, 8)
        assert multiply(factors).abs().max() < 1e-15 * multiply(initial[name]).norm()


@pytest.mark.parametrize("rank", [1, 5, 12, 24, 30])
@pytest.mark.parametrize(("d_out", "d_in"), [(56, 24), (24, 56), (13, 11)])
def test_the_cut_is_the_truncated_svd_of_the_whole_product(
    rank: int, d_out: int, d_in: int
) -> None:
    generator = torch.Generator().manual_seed(rank)
    # Wider than the small module's sides, whose product then has fewer singular values.
    product = Factors(
        torch.randn(24, d_in, generator=generator, dtype=torch.float64),
        torch.randn(d_out, 24, generator=generator, dtype=torch.float64),
    )
    cut = plain_lora.truncate_product(product, rank, torch.float64)
    assert (len(cut.kept.a), cut.kept.b.shape[1]) == (rank, rank)
    whole = multiply(product)
    u, values, vh = torch.linalg.svd(whole, full_matrices=False)
    wanted = (u[:, :rank] * values[:rank]) @ vh[:rank]
    assert (multiply(cut.kept) - wanted).norm() < 1e-12 * whole.norm()
    assert (multiply(cut.kept) + multiply(cut.dropped) - whole).norm() < 1e-12 * whole.norm()
    assert cut.norm == pytest.approx(whole.norm().item(), rel=1e-12)
    left_out = (whole - multiply(cut.kept)).norm().item()
    assert cut.error == pytest.approx(left_out, abs=1e-12 * cut.norm)
    largest = cut.kept.b.gather(0, cut.kept.b.abs().argmax(0, keepdim=True))
    assert (largest >= 0).all()


def test_the_cut_of_nothing_is_nothing() -> None:
    product = Factors(torch.randn(4, 9), torch.zeros(7, 4))
    cut = plain_lora.truncate_product(product, 2, torch.float32)
    assert (cut.norm, cut.error) == (0.0, 0.0)
    assert not multiply(cut.kept).any()
