"""Tiny models and their greedy responses, for tests of generation."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from eval.generation.decoding import Completion, find_end_tokens
from eval.generation.generate import generate_responses
from launch.models.check import get_num_positions

CPU = torch.device("cpu")


def generate_all(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list, **options: object
) -> list[str | None]:
    """Return the texts of `complete_all`."""
    found = complete_all(model, tokenizer, prompts, **options)
    return [None if one is None else one.text for one in found]


def complete_all(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list, **options: object
) -> list[Completion | None]:
    """Return all responses in the order of the prompts; check that each comes once."""
    positions = get_num_positions(model.config)
    options = {
        "device": CPU,
        "sharded": False,
        "num_positions": positions,
        "end_tokens": find_end_tokens(model, tokenizer),
        **options,
    }
    found: dict[int, Completion | None] = {}
    for part in generate_responses(model, tokenizer, prompts, **options):
        assert part
        assert not found.keys() & part.keys()
        found |= part
    return [found[i] for i in range(len(prompts))]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 40 words; 0 ends a sequence."""
    words = {"</s>": 0} | {f"w{i}": i for i in range(1, 40)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def make_model() -> LlamaForCausalLM:
    """Return a seeded Llama with a context of 32 tokens."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def make_other_models() -> dict[str, PreTrainedModel]:
    """Return seeded models that cache or place tokens in other ways than a Llama."""
    torch.manual_seed(2)
    common = {"vocab_size": 40, "initializer_range": 0.5, "bos_token_id": None, "eos_token_id": 0}
    llama = common | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    }
    layers = ["conv", "full_attention", "conv"]
    return {
        "learned positions": GPT2LMHeadModel(
            GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=32)
        ),
        "sliding window": MistralForCausalLM(
            MistralConfig(**llama, num_hidden_layers=2, sliding_window=6)
        ),
        "convolutions": Lfm2ForCausalLM(
            Lfm2Config(**llama, num_hidden_layers=3, layer_types=layers)
        ),
    }


def decode_greedily(model: PreTrainedModel, ids: list[int], most: int) -> list[int]:
    """Return the tokens after one prompt, one at a time, without a cache or padding."""
    new: list[int] = []
    with torch.no_grad():
        while len(new) < most and len(ids) + len(new) < 32:
            logits = model(input_ids=torch.tensor([ids + new]), use_cache=False).logits
            token = logits[0, -1].argmax().item()
            if token == 0:
                break
            new.append(token)
    return new
