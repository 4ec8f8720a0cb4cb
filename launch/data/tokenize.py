"""Rows to token ids."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase

from launch.data.prompts import format_prompt
from launch.data.rows import Row


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokenise `texts` with the tokenizer's beginning-of-sequence token, but no end token.

    Training, calibration and evaluation all tokenise by this function. Text that spells a special
    token, such as HTML's `</s>`, is text: it becomes the tokens of its characters. Where a
    tokenizer cannot do that (see `SpecialTokens`), it becomes the special token. A fast tokenizer
    uses all cores.
    """
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        return_attention_mask=False,
        verbose=False,
        split_special_tokens=can_split_special_tokens(tokenizer),
    ).input_ids
    # Some tokenizers add an end-of-sequence token by themselves.
    return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in encoded]


def can_split_special_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer can split text that spells a special token as any other text.

    Not transformers' own tokenizers in Python, which would take added tokens that are not special
    for text too; they are few, and old.
    """
    return not isinstance(tokenizer, PreTrainedTokenizer)


def join_texts(texts: Iterable[str]) -> str:
    """Join texts by empty lines, without blank ones; "" if all are."""
    return "\n\n".join(text for text in texts if text.strip())


_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


class SpecialTokens(NamedTuple):
    """A tokenizer's special tokens, and where it puts them around a text by itself.

    Tokenizers of the unigram kind have special tokens among the pieces of their model, and find
    them in a text even where special tokens are to be text.
    """

    ids: frozenset[int]  # without the unknown token, which stands for text
    num_before: int  # tokens that are put before a text
    num_after: int  # tokens that are put after it, without the end of sequence

    def occur_in(self, ids: Sequence[int]) -> bool:
        """Return whether the text of a row, as `tokenize_rows` yields it, holds a special token."""
        end = len(ids) - 1 - self.num_after
        return not self.ids.isdisjoint(ids[self.num_before : end])


def find_special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """Find a tokenizer's special tokens."""
    ids = set(tokenizer.all_special_ids)
    for number, token in tokenizer.added_tokens_decoder.items():
        # Some tokenizers call the tokens of single bytes special, which stand for text as well.
        if token.special and not _BYTE_TOKEN.fullmatch(token.content):
            ids.add(number)
    text = tokenizer("a", add_special_tokens=False).input_ids
    whole = encode_texts(tokenizer, ["a"])[0]
    starts = [i for i in range(len(whole)) if whole[i : i + len(text)] == text]
    num_before = starts[0] if starts else 0
    num_after = len(whole) - num_before - len(text) if starts else 0
    return SpecialTokens(frozenset(ids - {tokenizer.unk_token_id}), num_before, num_after)


def tokenize_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], int]]:
    """Tokenise rows as prompt + answer + newline + end of sequence.

    Yields:
        The token ids of each row, and its prompt length: the number of tokens before the first
        one that holds part of the answer. A token that holds the end of the prompt and the
        beginning of the answer counts as answer.
    """
    prompts = [format_prompt(row.instruction, row.input) for row in rows]
    texts = [prompt + row.answer + "\n" for prompt, row in zip(prompts, rows, strict=True)]
    encoded_prompts = encode_texts(tokenizer, prompts)
    encoded_texts = encode_texts(tokenizer, texts)
    for prompt_ids, text_ids in zip(encoded_prompts, encoded_texts, strict=True):
        ids = [*text_ids, tokenizer.eos_token_id]
        yield ids, _count_common_prefix(prompt_ids, ids)


def tokenize_text(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    max_length: int,
    special: SpecialTokens,
) -> list[tuple[list[int], int]]:
    """Tokenise rows of plain text, joined by empty lines, in blocks of at most `max_length` tokens.

    Text such as wikitext's has a row for each line or paragraph, many of them blank, which are
    skipped. Row by row most examples would be a few tokens long; the loaders of Astra's and CorDA's
    authors join the rows too. Each block begins with what the tokenizer puts before a text.

    Returns:
        Token ids of each block, the last of which may be short, and the number of its tokens
        before the first that is predicted.
    """
    text = join_texts(texts)
    if not text:
        return []
    (ids,) = encode_texts(tokenizer, [text])
    before, end = ids[: special.num_before], len(ids) - special.num_after
    prompt_length = max(1, len(before))  # there is nothing to predict the first token from
    size = max(1, max_length - len(before))
    blocks = []
    for start in range(len(before), end, size):
        block = before + ids[start : min(start + size, end)]
        if len(block) > prompt_length:
            blocks.append((block, prompt_length))
    return blocks


def _count_common_prefix(prompt_ids: list[int], ids: list[int]) -> int:
    """Count the leading tokens that a prompt and its whole text share.

    They differ before the prompt's end where a tokenizer merges its last characters with the
    answer's first ones.
    """
    length = len(prompt_ids)
    if ids[:length] == prompt_ids:  # nearly always, and much faster than the loop
        return length
    for index, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)):
        if a != b:
            return index
    return len(ids)
