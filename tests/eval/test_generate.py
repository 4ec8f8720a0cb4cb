"""Batched generation is greedy, in the order of the prompts, and stops where it should."""

import copy
from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval.errors import EvalError
from eval.generate import generate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"</s>": 0} | {f"w{i}": i for i in range(1, 40)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
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


def greedy(model: LlamaForCausalLM, ids: list[int], most: int) -> list[int]:
    """One prompt, one token at a time, no cache, no padding."""
    new: list[int] = []
    with torch.no_grad():
        while len(new) < most and len(ids) + len(new) < 32:
            token = model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax().item()
            if token == 0:
                break
            new.append(token)
    return new


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_equals_one_by_one_greedy_decoding(
    batch_size: int, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 40, (1 + 3 * (i % 5),), generator=draw).tolist() for i in range(12)]
    texts = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=batch_size, device=CPU, sharded=False)
    assert texts == [tokenizer.decode(greedy(model, ids, 8)) for ids in prompts]
    assert len({len(text.split()) for text in texts}) > 1  # some stop early


def test_stops_at_the_end_of_the_context(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = [5] * 30
    options = {"max_new_tokens": 100, "batch_size": 2, "device": CPU, "sharded": False}
    assert len(generate(model, tokenizer, [prompt], **options)[0].split()) <= 2
    with pytest.raises(EvalError, match="a prompt of 32 tokens fills the model's context of 32"):
        generate(model, tokenizer, [[5] * 32], **options)
    assert generate(model, tokenizer, [], **options) == []


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_short_prompt_gets_its_tokens_beside_a_long_one(
    batch_size: int, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """`max_new_tokens` is per prompt: only a prompt whose own context ends gets fewer, whatever runs beside it."""
    prompts = [[5] * 29, [7, 8], [9] * 30, [3, 4, 6]]
    texts = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=batch_size, device=CPU, sharded=False)
    assert texts == [tokenizer.decode(greedy(model, ids, 8)) for ids in prompts]
    assert max(len(text.split()) for text in texts) > 3


@pytest.mark.parametrize(
    "setting",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.5},
        {"num_beams": 4},
        {"repetition_penalty": 9.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 7},
        {"max_length": 5},
        {"bad_words_ids": [[i] for i in range(20, 40)]},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_checkpoints_own_generation_settings_do_not_change_greedy_decoding(
    setting: dict, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Chat checkpoints ship such settings (repetition_penalty among them); the protocol is greedy for all."""
    draw = torch.Generator().manual_seed(4)
    prompts = [torch.randint(1, 40, (length,), generator=draw).tolist() for length in (3, 9, 5, 12)]
    wanted = [tokenizer.decode(greedy(model, ids, 8)) for ids in prompts]
    changed = copy.deepcopy(model)
    for name, value in setting.items():
        setattr(changed.generation_config, name, value)
    texts = generate(changed, tokenizer, prompts, max_new_tokens=8, batch_size=2, device=CPU, sharded=False)
    assert texts == wanted


def test_end_of_sequence_tokens_inside_a_prompt_are_read_and_not_taken_for_padding(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = [[0, 0, 5, 6], [7, 0, 8, 9, 10, 11, 12], [0]]
    texts = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=3, device=CPU, sharded=False)
    assert texts == [tokenizer.decode(greedy(model, ids, 6)) for ids in prompts]
    assert any(texts)


def test_equal_prompts_get_equal_texts_and_each_batch_is_reported_once(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    seen = []

    def progress(batches: range) -> Iterator[int]:
        for batch in batches:
            seen.append(batch)
            yield batch

    options = {"max_new_tokens": 5, "batch_size": 2, "device": CPU, "sharded": False, "progress": progress}
    texts = generate(model, tokenizer, [[5, 6], [7], [5, 6], [8, 9, 10], [5, 6]], **options)
    assert texts[0] == texts[2] == texts[4]
    assert seen == [0, 1, 2]
