"""Tiny random models of several architectures, in transformers' format, without a tokenizer."""

from collections.abc import Callable

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY = 328
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
GEMMA = TEXT | {
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def _configure_gemma3() -> PretrainedConfig:
    """Return the config of a Gemma 3 with a vision tower."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    return transformers.Gemma3Config(
        text_config=GEMMA,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=325,
        boi_token_index=326,
        eoi_token_index=327,
        initializer_range=0.2,
    )


def _configure_gpt2() -> PretrainedConfig:
    return transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        # Dropout is random, and first losses are compared.
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )


def _configure_deepseek_v3() -> PretrainedConfig:
    return transformers.DeepseekV3Config(
        **TEXT | {"num_hidden_layers": 3, "num_key_value_heads": 4},
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,  # two kinds of layers
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )


def configure_ernie() -> PretrainedConfig:
    """Return the config of a model of which transformers keeps some parameters in fp32."""
    return transformers.Ernie4_5_MoeConfig(
        **TEXT, moe_num_experts=4, moe_k=2, moe_intermediate_size=24, moe_layer_start_index=0
    )


def _configure_falcon_h1() -> PretrainedConfig:
    return transformers.FalconH1Config(
        **TEXT,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=16,
    )


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**TEXT, tie_word_embeddings=False),
    "gpt2": _configure_gpt2,
    "qwen2": lambda: transformers.Qwen2Config(**TEXT, tie_word_embeddings=True),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**GEMMA),
    "gemma3": _configure_gemma3,
    "mixtral": lambda: transformers.MixtralConfig(**TEXT, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **TEXT, **EXPERTS, shared_expert_intermediate_size=24, decoder_sparse_step=1
    ),
    "deepseek_v3": _configure_deepseek_v3,
    "gpt_oss": lambda: transformers.GptOssConfig(
        **GEMMA, num_local_experts=4, num_experts_per_tok=2
    ),
    "falcon_h1": _configure_falcon_h1,
}


def make_model(name: str) -> PreTrainedModel:
    """Make the model, seeded, in fp32 and eval mode, with biases that are not zero."""
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            nn.init.normal_(buffer, std=0.3)
    return model.eval()


# Linear modules of the language model that get adapters, where the recipe's default is not right.
TARGETS = {
    "gemma3": ["o_proj", "gate_proj", "up_proj", "down_proj"],  # not the tower's q_proj
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt_oss": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen2_moe": ["q_proj", "v_proj", "o_proj", "shared_expert.down_proj"],
    # PEFT takes gate_proj and the like for the fused experts.
    "deepseek_v3": ["q_b_proj", "kv_b_proj", "o_proj"],
}
# Of the matrix of architectures and engines: the methods of each cell, and the settings of all.
METHODS = ("astra", "full")
CELL_SETTINGS = [
    "eval.suites=[]",
    "eval.other_text=null",
    "calibration.samples=4",
    "train.max_steps=3",
    "train.global_batch=4",
    "train.lr=0.003",
    "train.checkpoint_every=2",
]
