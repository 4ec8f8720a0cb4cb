"""astra.saved_adapter: an adapter of PEFT gives the logits of plain PEFT, or is refused in a line.

One tiny random model for each kind that a field of PEFT's LoraConfig makes, on the CPU: loaded
whole, and as it is loaded into a sharded model. A few seconds.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from astra import saved_adapter
from astra.errors import AstraError
from astra.weights import TorchWeights

TARGETS = ["q_proj", "k_proj", "down_proj"]
IDS = torch.randint(60, (2, 11), generator=torch.Generator().manual_seed(9))
SIZES = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, attention_bias=True)).eval()


def make_tied_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True)).eval()


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=4, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


def make_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, **HEADS, num_local_experts=3, head_dim=6)
    return MixtralForCausalLM(config).eval()


# Kind -> what LoraConfig has beside r, alpha and the targets. Those that are the same on sharded
# weights, and those for which PEFT needs whole ones.
ANYWHERE = {
    "plain": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig()},
    "mica": {"init_lora_weights": "mica"},
    "no initialisation": {"init_lora_weights": False},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {r"layers\.1.*q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    "patterns of rslora": {"rank_pattern": {"q_proj": 2}, "use_rslora": True},
    "all biases": {"bias": "all"},
    "biases of the targets": {"bias": "lora_only"},
    "bias of B": {"lora_bias": True},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "a regular expression": {"target_modules": r".*\.1\..*(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "gpt2 dora": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True},
    "experts' attention": {"target_modules": ["q_proj", "o_proj"]},
}
WHOLE = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa of patterns": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}},
    "pissa of rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "olora": {"init_lora_weights": "olora"},
    "gpt2 pissa": {
        "init_lora_weights": "pissa",
        "target_modules": ["c_attn"],
        "fan_in_fan_out": True,
    },
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved norms": {"modules_to_save": ["input_layernorm"]},
    "tied saved embedding": {"modules_to_save": ["embed_tokens"]},
    "tied both": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [3, 5]},
    "tied tokens": {"trainable_token_indices": {"embed_tokens": [3, 5]}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "tied embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "repeated layers": {"layer_replication": [[0, 2], [1, 2]]},
    "a parameter": {"target_parameters": ["mlp.down_proj.weight"], "target_modules": ["q_proj"]},
    "experts": {"target_parameters": ["experts.gate_up_proj"], "target_modules": ["q_proj"]},
    "kasa": {"kasa_config": KasaConfig()},
    "velora": {"velora_config": VeloraConfig(num_groups=4)},
    "blocks": {
        "use_bdlora": BdLoraConfig(
            target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj", "k_proj"], nblocks=2
        )
    },
}


def choose_base(kind: str) -> Callable[[], nn.Module]:
    first = kind.split()[0]
    return {"gpt2": make_gpt2, "tied": make_tied_llama}.get(
        first, make_mixtral if first.startswith("experts") else make_llama
    )


def make_adapter(folder: Path, make_base: Callable[[], nn.Module], **fields: object) -> None:
    """Save an adapter with plain PEFT, all that it trains moved."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    model = get_peft_model(make_base(), LoraConfig(**config | fields))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def compute(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def read(
    folder: Path, make_base: Callable[[], nn.Module] = make_llama, sharded: bool = False
) -> saved_adapter.SavedAdapter:
    with torch.device("meta"):
        empty = make_base()
    return saved_adapter.read_saved_adapter(folder, empty, sharded)


@pytest.mark.parametrize("kind", [*ANYWHERE, *WHOLE])
def test_logits_are_those_of_plain_peft_or_a_line(kind: str, tmp_path: Path) -> None:
    make_base = choose_base(kind)
    make_adapter(tmp_path, make_base, **(ANYWHERE | WHOLE)[kind])
    wanted = compute(PeftModel.from_pretrained(make_base(), tmp_path))
    assert (wanted - compute(make_base())).abs().max() > 0.1  # it is no adapter of zeros
    model = saved_adapter.load_saved_adapter(make_base(), read(tmp_path, make_base))
    assert torch.equal(compute(model), wanted)
    if kind in WHOLE:
        with pytest.raises(AstraError) as error:
            read(tmp_path, make_base, sharded=True)
        assert error.value.subject == "sharded"
        return
    saved = read(tmp_path, make_base, sharded=True)
    model = saved_adapter.attach_saved_adapter(make_base(), saved)
    saved_adapter.write_saved_adapter(model, saved, TorchWeights())
    assert torch.equal(compute(model), wanted)


def test_a_bin_file_is_read_as_peft_reads_it(tmp_path: Path) -> None:
    make_adapter(tmp_path, make_llama)
    wanted = compute(PeftModel.from_pretrained(make_llama(), tmp_path))
    values = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(values), tmp_path / "adapter_model.bin")
    values.unlink()
    model = saved_adapter.load_saved_adapter(make_llama(), read(tmp_path))
    assert torch.equal(compute(model), wanted)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")  # a pickle with code
    with pytest.raises(AstraError, match="PEFT cannot load"):
        read(tmp_path)


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4, and PEFT cannot rebuild"),
        ({"init_lora_weights": "corda"}, "corda, and PEFT cannot rebuild"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga, and PEFT cannot rebuild"),
        ({"init_lora_weights": "astra"}, "astra, which is not supported"),
        ({"init_lora_weights": 1}, "init_lora_weights 1, which is not supported"),
        ({"monteclora_config": {"num_samples": 4}}, "sets monteclora_config, which is not"),
        ({"alora_invocation_tokens": [1, 2]}, "sets alora_invocation_tokens, which is not"),
        ({"arrow_config": {"top_k": 1}}, "sets arrow_config, which is not"),
        ({"use_qalora": True}, "sets use_qalora, which is not"),
        ({"megatron_config": {"x": 1}}, "sets megatron_config, which is not"),
        ({"use_of_tomorrow": True}, "sets use_of_tomorrow, which PEFT .* does not know"),
        ({"task_type": "SEQ_CLS"}, "is for the task SEQ_CLS"),
        ({"peft_type": "IA3"}, "is a IA3 adapter, not a LoRA"),
        ({"peft_type": "OF_TOMORROW"}, "is a OF_TOMORROW adapter, not a LoRA"),
        ({"r": 0}, "PEFT cannot load .*`r` should be a positive integer"),
        ({"target_modules": ["absent"]}, "PEFT cannot load .*absent"),
        ({"target_modules": "(", "peft_type": "LORA"}, "PEFT cannot load"),
        ({"target_modules": ["q_proj", "down_proj"]}, "it has base_model.*k_proj.lora_A"),
        ({"target_modules": [*TARGETS, "v_proj"]}, "it lacks base_model.*v_proj.lora_A"),
        ({"use_dora": True}, "it lacks .*lora_magnitude_vector"),
        ({"bias": "all"}, "it lacks .*bias"),
        ({"modules_to_save": ["lm_head"]}, "PEFT cannot load .*lm_head"),
        ({"r": 3}, "PEFT cannot load .*size mismatch"),
    ],
)
def test_what_is_not_supported_is_named(fields: dict, message: str, tmp_path: Path) -> None:
    make_adapter(tmp_path, make_llama)
    change_config(tmp_path, **fields)
    with pytest.raises(AstraError, match=message) as error:
        read(tmp_path)
    assert error.value.subject == "adapter"
    assert "\n" not in str(error.value)


def test_fields_that_are_off_are_no_reason_to_refuse(tmp_path: Path) -> None:
    make_adapter(tmp_path, make_llama)
    off = {"use_of_tomorrow": False, "config_of_tomorrow": None, "modules_to_save": []}
    change_config(tmp_path, **off, lora_ga_config=dataclasses.asdict(LoraGAConfig()))
    assert read(tmp_path, sharded=True).unknown == ("config_of_tomorrow", "use_of_tomorrow")


def test_every_field_of_peft_is_classified() -> None:
    """A field that a new version brings is refused where it is set, until someone has read it."""
    refused = {
        "alora_invocation_tokens",
        "arrow_config",
        "megatron_config",
        "monteclora_config",
        "use_qalora",
    }
    known = saved_adapter.ANYWHERE | saved_adapter.ON_WHOLE_WEIGHTS | refused
    known |= {"task_type", "init_lora_weights"}  # checked by value
    assert {field.name for field in dataclasses.fields(LoraConfig)} == known
    assert not saved_adapter.ANYWHERE & saved_adapter.ON_WHOLE_WEIGHTS


def test_damaged_files_are_named(tmp_path: Path) -> None:
    make_adapter(tmp_path, make_llama)
    values = tmp_path / "adapter_model.safetensors"
    whole = values.read_bytes()
    values.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AstraError, match="PEFT cannot load"):
        read(tmp_path)
    values.unlink()
    with pytest.raises(AstraError, match=r"has no adapter_model\.safetensors"):
        read(tmp_path)
    for text in ("{not json", "[]", "{}"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(AstraError, match=r"adapter_config\.json cannot be read"):
            read(tmp_path)


def test_keys_of_another_tool_are_not_skipped(tmp_path: Path) -> None:
    make_adapter(tmp_path, make_llama)
    values = tmp_path / "adapter_model.safetensors"
    tensors = {key.replace("base_model.model.", ""): t for key, t in load_file(values).items()}
    save_file(tensors, values)
    with pytest.raises(AstraError, match=r"it has model\.layers\.0"):
        read(tmp_path)


def test_another_kind_of_adapter_is_refused(tmp_path: Path) -> None:
    get_peft_model(make_llama(), VeraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(AstraError, match="is a VERA adapter, not a LoRA"):
        read(tmp_path)


def test_montecloras_samples_are_refused_as_peft_saves_them(tmp_path: Path) -> None:
    make_adapter(tmp_path, make_llama, monteclora_config=MontecloraConfig())
    with pytest.raises(AstraError, match="sets monteclora_config"):
        read(tmp_path)
