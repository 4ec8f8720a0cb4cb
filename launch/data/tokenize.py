"""Rows to token ids."""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from launch.data.prompts import format_prompt
from launch.data.sources import Row


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokenise `texts` with the tokenizer's beginning-of-sequence token, but no end token.

    A fast tokenizer uses all cores.
    """
    if not texts:
        return []
    encoded = tokenizer(texts, return_attention_mask=False, verbose=False).input_ids
    # Some tokenizers add an end-of-sequence token by themselves.
    return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in encoded]


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
        yield ids, _common_prefix_length(prompt_ids, ids)


def _common_prefix_length(prompt_ids: list[int], ids: list[int]) -> int:
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
