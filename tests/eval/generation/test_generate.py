"""Batched generation equals one-by-one greedy decoding, and stops where it should.

Also drawn tokens, and other kinds of model. Needs the shared stories260K and GSM8K for one test.
About half a minute.
"""

import copy
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from eval.errors import EvalError
from eval.generation.generate import find_overlong_prompts
from eval.tasks import gsm8k
from tests.support.generation import (
    CPU,
    complete_all,
    decode_greedily,
    generate_all,
    make_model,
    make_other_models,
    make_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_equals_one_by_one_greedy_decoding(
    batch_size: int, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 40, (1 + 3 * (i % 5),), generator=draw).tolist() for i in range(12)]
    texts = generate_all(
        model,
        tokenizer,
        prompts,
        max_new_tokens=8,
        batch_size=batch_size,
        device=CPU,
        sharded=False,
    )
    assert texts == [tokenizer.decode(decode_greedily(model, ids, 8)) for ids in prompts]
    assert len({len(text.split()) for text in texts}) > 1  # some stop early


def test_stops_at_the_end_of_the_context(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = [5] * 30
    options = {"max_new_tokens": 100, "batch_size": 2, "device": CPU, "sharded": False}
    assert len(generate_all(model, tokenizer, [prompt], **options)[0].split()) <= 2
    assert find_overlong_prompts([[5] * 31, [5] * 32], 32) == [1]
    full = generate_all(model, tokenizer, [[5] * 32, [5] * 31, [5] * 40], **options)
    assert [full[0], full[2]] == [None, None]
    assert generate_all(model, tokenizer, [], **options) == []


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_short_prompt_gets_its_tokens_beside_a_long_one(
    batch_size: int, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Only a prompt whose own context ends gets fewer than `max_new_tokens`."""
    prompts = [[5] * 29, [7, 8], [9] * 30, [3, 4, 6]]
    texts = generate_all(
        model,
        tokenizer,
        prompts,
        max_new_tokens=8,
        batch_size=batch_size,
        device=CPU,
        sharded=False,
    )
    assert texts == [tokenizer.decode(decode_greedily(model, ids, 8)) for ids in prompts]
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
    """Chat checkpoints ship such settings, but decoding is greedy for all."""
    draw = torch.Generator().manual_seed(4)
    prompts = [torch.randint(1, 40, (length,), generator=draw).tolist() for length in (3, 9, 5, 12)]
    wanted = [tokenizer.decode(decode_greedily(model, ids, 8)) for ids in prompts]
    changed = copy.deepcopy(model)
    for name, value in setting.items():
        setattr(changed.generation_config, name, value)
    texts = generate_all(
        changed, tokenizer, prompts, max_new_tokens=8, batch_size=2, device=CPU, sharded=False
    )
    assert texts == wanted


def test_end_of_sequence_tokens_inside_a_prompt_are_read_and_not_taken_for_padding(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = [[0, 0, 5, 6], [7, 0, 8, 9, 10, 11, 12], [0]]
    texts = generate_all(
        model, tokenizer, prompts, max_new_tokens=6, batch_size=3, device=CPU, sharded=False
    )
    assert texts == [tokenizer.decode(decode_greedily(model, ids, 6)) for ids in prompts]
    assert any(texts)


def test_equal_prompts_get_equal_texts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = generate_all(
        model, tokenizer, [[5, 6], [7], [5, 6], [8, 9, 10], [5, 6]], max_new_tokens=5, batch_size=2
    )
    assert texts[0] == texts[2] == texts[4]


@pytest.mark.parametrize("kind", ["learned positions", "sliding window", "convolutions"])
def test_other_kinds_of_model_equal_one_by_one_greedy_decoding(
    kind: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Positions end at the context, and a window counts tokens, not padding.

    Rows that cache more than keys and values are not joined.
    """
    model = make_other_models()[kind].eval()
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 40, (1 + 5 * (i % 7),), generator=draw).tolist() for i in range(15)]
    texts = generate_all(model, tokenizer, prompts, max_new_tokens=20, batch_size=4)
    assert texts == [tokenizer.decode(decode_greedily(model, ids, 20)) for ids in prompts]


def test_a_model_without_keys_and_values_is_refused_by_name(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = MambaForCausalLM(
        MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4)
    ).eval()
    with pytest.raises(EvalError, match="MambaForCausalLM keeps no keys and values") as error:
        generate_all(model, tokenizer, [[5, 6]], max_new_tokens=3, batch_size=1)
    assert error.value.subject == "model"


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_how_often_places_fill_again_changes_nothing(
    steps: int,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("eval.generation.generate._choose_interval", lambda _: steps)
    draw = torch.Generator().manual_seed(6)
    prompts = [torch.randint(1, 40, (1 + 4 * (i % 7),), generator=draw).tolist() for i in range(15)]
    texts = generate_all(model, tokenizer, prompts, max_new_tokens=11, batch_size=4)
    assert texts == [tokenizer.decode(decode_greedily(model, ids, 11)) for ids in prompts]


@pytest.mark.parametrize("known_to", ["generation settings", "config", "tokenizer"])
def test_an_end_token_that_is_not_special_is_cut_off(
    known_to: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Skipping special tokens would leave such a token in the text, and what follows it."""
    model, tokenizer = copy.deepcopy(model), copy.deepcopy(tokenizer)
    prompts = [[5, 6], [7], [8, 9, 10]]
    options = {"max_new_tokens": 8, "batch_size": 2}
    whole = generate_all(model, tokenizer, prompts, **options)
    end = whole[0].split()[2]  # an ordinary word
    token = tokenizer.convert_tokens_to_ids(end)
    if known_to == "tokenizer":
        tokenizer.eos_token = end
        assert tokenizer.eos_token_id == token
    elif known_to == "config":
        model.config.eos_token_id = [0, token]
    else:
        model.generation_config.eos_token_id = [39, token, 0]
    found = generate_all(model, tokenizer, prompts, **options)
    assert found == [" ".join(_take_until(end, text.split())) for text in whole]
    assert found[0] != whole[0]


def _take_until(end: str, words: list[str]) -> list[str]:
    return words[: words.index(end)] if end in words else words


def test_a_stop_ends_a_response_and_is_cut_off(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = [[5, 6], [7], [8, 9, 10]]
    whole = generate_all(model, tokenizer, prompts, max_new_tokens=8, batch_size=2)
    stop = whole[0].split()[2]
    found = generate_all(
        model, tokenizer, prompts, max_new_tokens=8, batch_size=2, stops=[stop, "never"]
    )
    assert found == [text.partition(stop)[0] for text in whole]
    assert found[0] != whole[0]


def test_a_response_says_whether_it_was_cut_off(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 40, (1 + 3 * (i % 5),), generator=draw).tolist() for i in range(12)]
    prompts += [[5, 6], [5] * 31]  # the last has room for one token
    options = {"max_new_tokens": 8, "batch_size": 4}
    found = complete_all(model, tokenizer, prompts, **options)
    lengths = [len(decode_greedily(model, ids, 8)) for ids in prompts]
    cut = [length == min(8, 32 - len(ids)) for length, ids in zip(lengths, prompts, strict=True)]
    assert [one.truncated for one in found] == cut
    assert set(cut) == {True, False}
    *_, first, _ = found
    stop = first.text.split()[2]
    (stopped,) = complete_all(model, tokenizer, [[5, 6]], stops=[stop], **options)
    assert first.truncated and not stopped.truncated


def test_draws_depend_on_the_seed_and_not_on_the_batch(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, seeds = [[5, 6]] * 3 + [[8, 9, 10], [7]], [1, 2, 1, 3, 4]
    options = {"max_new_tokens": 8, "temperature": 1.0, "seeds": seeds}
    texts = generate_all(model, tokenizer, prompts, batch_size=5, **options)
    assert texts[0] == texts[2] != texts[1]
    monkeypatch.setattr("eval.generation.generate._choose_interval", lambda _: 3)
    assert generate_all(model, tokenizer, prompts, batch_size=2, **options) == texts


def test_draws_follow_the_models_probabilities(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    n = 2000
    texts = generate_all(
        model,
        tokenizer,
        [[5, 6]] * n,
        max_new_tokens=1,
        batch_size=500,
        temperature=2.0,
        seeds=list(range(n)),
    )
    with torch.no_grad():
        wanted = (model(input_ids=torch.tensor([[5, 6]])).logits[0, -1] / 2).softmax(0)
    counts = torch.bincount(
        torch.tensor([int(text[1:]) if text else 0 for text in texts]), minlength=40
    )
    # Five standard errors of a binomial proportion.
    assert ((counts / n - wanted).abs() <= 5 * (wanted * (1 - wanted) / n).sqrt() + 1e-3).all()


@pytest.mark.slow
def test_batches_change_nothing_on_real_weights_but_ties(shared: Path) -> None:
    """A response may differ only where the two best logits are within 1e-4; those are counted."""
    folder = shared / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = [problem.question for problem in gsm8k.read_problems(shared / "data", 40)]
    prompts = [ids for ids in tokenizer(questions).input_ids if len(ids) < 400]
    alone = generate_all(model, tokenizer, prompts, max_new_tokens=96, batch_size=1)
    ties = 0
    for batch_size in (7, 32):
        together = generate_all(model, tokenizer, prompts, max_new_tokens=96, batch_size=batch_size)
        for ids, a, b in zip(prompts, alone, together, strict=True):
            if a == b:
                continue
            ties += 1
            ids_a, ids_b = (tokenizer(text, add_special_tokens=False).input_ids for text in (a, b))
            same = next(
                i for i, pair in enumerate(zip(ids_a, ids_b, strict=False)) if pair[0] != pair[1]
            )
            with torch.no_grad():
                best = model(torch.tensor([ids + ids_a[:same]])).logits[0, -1].topk(2).values
            assert best[0] - best[1] < 1e-4
    print(f"{ties} of {2 * len(prompts)} responses differ, at ties")
    assert ties <= 2
