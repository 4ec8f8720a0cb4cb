"""Prove that text which spells a special token stays text, in training and at evaluation.

Tokenizers of four kinds: byte-level BPE (GPT-2, Llama 3), BPE with byte fallback (Llama 2),
WordPiece (BERT) and unigram, which cannot do it and is counted. Needs nothing; 3 s.
"""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from launch.config.loading import read_recipe
from launch.config.schema import Data
from launch.data.preparation import render_report
from launch.data.prompts import format_prompt
from launch.data.rows import Row
from launch.data.token_cache import SPECIAL, obtain_tokens
from launch.data.tokenize import encode_texts, find_special_tokens, tokenize_rows
from tests.support.rows import write_lines

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<|im_end|>"]
TOOL = "<tool>"  # an added token that is not special
# The letters of special tokens, but none of them whole: BPE would learn to merge it.
CORPUS = [format_prompt("What is 1 + 2? Strike x through, </ s >."), "It is 3: <, im_end, |, tool>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Add BOS by a template, as Llama's tokenizers do, and the special and added tokens."""
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    whole.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    whole.add_tokens([AddedToken(TOOL, normalized=False)])
    return whole


def make_byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer)


def make_byte_fallback() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*SPECIAL_TOKENS, *BYTES], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer)


def make_word_piece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer)


def make_unigram() -> PreTrainedTokenizerFast:
    letters = sorted(set("".join(CORPUS)) | {"▁"})
    pieces = [(token, 0.0) for token in SPECIAL_TOKENS] + [(letter, -3.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return wrap(tokenizer)


KINDS = {
    "byte level": make_byte_level(),
    "byte fallback": make_byte_fallback(),
    "word piece": make_word_piece(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_spelled_special_tokens_are_text(kind: str) -> None:
    tokenizer = KINDS[kind]
    text = "Strike <s>x</s> through. <|im_end|>"
    ids = encode_texts(tokenizer, [text])[0]
    assert ids[0] == tokenizer.bos_token_id
    special = find_special_tokens(tokenizer)
    assert special.ids == set(tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[1:]))
    assert special.ids.isdisjoint(ids[1:])
    found, original = (
        "".join(tokenizer.decode(ids[1:]).split()),
        "".join(text.split()),
    )
    assert found == original
    rows = [Row(1, text, "", "<s>1</s> is struck, 2 is not.</s>"), Row(2, "q", "", "a")]
    for row_ids, prompt_length in tokenize_rows(rows, tokenizer):
        assert row_ids[-1] == tokenizer.eos_token_id  # ours, and the only one
        assert row_ids.count(tokenizer.eos_token_id) == 1
        assert not special.occur_in(row_ids)
        assert 0 < prompt_length < len(row_ids)
    # Evaluation's prompt begins the training row, token by token.
    prompt = encode_texts(tokenizer, [format_prompt(text)])[0]
    assert next(iter(tokenize_rows(rows, tokenizer)))[0][: len(prompt)] == prompt


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.text(st.sampled_from("What is 1+2?\n é日#x<tool>"), max_size=40), st.booleans())
def test_all_other_text_has_the_tokens_it_always_had(kind: str, text: str, has_tool: bool) -> None:
    tokenizer = KINDS[kind]
    if has_tool:
        text = f"{text}{TOOL}{text}"
        assert tokenizer.convert_tokens_to_ids(TOOL) in encode_texts(tokenizer, [text])[0]
    assert encode_texts(tokenizer, [text])[0] == tokenizer(text).input_ids


def test_a_tokenizer_that_adds_tokens_on_both_sides_keeps_them() -> None:
    tokenizer = make_byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|im_end|> </s>",
        special_tokens=[
            (token, tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL_TOKENS
        ],
    )
    special = find_special_tokens(tokenizer)
    assert (special.num_before, special.num_after) == (1, 1)  # </s> is taken off and put back
    [(ids, _)] = tokenize_rows([Row(1, "q </s>", "", "a <s>")], tokenizer)
    names = tokenizer.convert_ids_to_tokens(ids)
    assert (names[0], names[-2:]) == ("<s>", ["<|im_end|>", "</s>"])
    assert not special.occur_in(ids)


def test_encoding_leaves_the_tokenizer_as_it_was(tmp_path: Path) -> None:
    tokenizer = make_byte_level()
    before = tokenizer.backend_tokenizer.to_str()
    encode_texts(tokenizer, ["</s>"])
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer("</s>").input_ids[-1] == tokenizer.eos_token_id


def test_a_tokenizer_that_cannot_is_counted_and_named(tmp_path: Path) -> None:
    make_unigram().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    answers = ["It is 3.", "<s>x</s> is 3.", "It is <|im_end|>", TOOL]
    path = write_lines(tmp_path / "a.jsonl", [{"query": "x", "response": a} for a in answers])
    found = obtain_tokens(Data(path=str(path)), tmp_path / "model")
    assert found.manifest["special"] == 2
    assert [row for row, _ in found.manifest["examples"][SPECIAL]] == [2, 3]
    assert found.open_tokens().num_special == 2
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name: {tmp_path}/model}}\ndata: {{path: {path}}}\n"
    )
    report = render_report(
        read_recipe(str(tmp_path / "recipe.yaml"), []).data, "base", found.manifest, {}
    )
    assert "| of them, text that became special tokens | 2 |" in report
    assert "- row 2: it holds text that became special tokens" in report


def test_real_rows_with_html_keep_their_ends(shared: Path, tmp_path: Path) -> None:
    base = shared / "models" / "stories260K"
    rows = [{"query": f"Strike {i}.", "response": f"<s>{i}</s> is struck."} for i in range(40)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    tokens = obtain_tokens(Data(path=str(path)), base).open_tokens()
    assert (tokens.tokens == 2).sum() == 40
    assert (tokens.tokens == 1).sum() == 40
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
    first = tokens.tokens[: tokens.offsets[1]].tolist()
    assert tokenizer.decode(first[int(tokens.prompt_lengths[0]) : -1]) == "<s>0</s> is struck.\n"
