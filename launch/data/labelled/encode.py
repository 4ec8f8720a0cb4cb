"""Texts, pairs and running text as a tokenizer encodes them for a model with a head."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase

from launch.data.tokenize import can_split_special_tokens, join_texts
from launch.runtime.errors import UserError


class EncodedText(NamedTuple):
    """The tokens of one row."""

    ids: list[int]
    types: list[int] | None  # 1 in a pair's second text; None where the model does not take them
    whole_length: int  # tokens before truncation


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, ...]],
    max_length: int,
    has_types: bool,
) -> list[EncodedText]:
    """Tokenise single texts or pairs with the tokenizer's own special tokens, which are kept.

    What is longer than `max_length` is truncated: of a pair the longer text, token by token. Text
    that spells a special token is text (see data.tokenize.encode_texts).

    Raises:
        UserError: the special tokens alone fill `max_length`.
    """
    if not texts:
        return []
    _require_room(tokenizer, max_length, is_pair=len(texts[0]) == 2)
    options = _make_options(tokenizer, has_types)
    columns = [list(column) for column in zip(*texts, strict=True)]
    whole = tokenizer(*columns, **options)
    encoded = []
    for i, ids in enumerate(whole.input_ids):
        types = whole.token_type_ids[i] if has_types else None
        if len(ids) > max_length:
            # In a batch too: alone, a pair with an empty second text would be a single text.
            pair = [[text] for text in texts[i]]
            cut = tokenizer(*pair, truncation="longest_first", max_length=max_length, **options)
            types = cut.token_type_ids[0] if has_types else None
            encoded.append(EncodedText(cut.input_ids[0], types, len(ids)))
        else:
            encoded.append(EncodedText(ids, types, len(ids)))
    return encoded


def tokenize_blocks(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], max_length: int, has_types: bool
) -> list[EncodedText]:
    """Tokenise rows of plain text, joined by empty lines, in blocks of at most `max_length` tokens.

    Each block has the tokenizer's own special tokens around it, as a single text has. Blank rows are
    skipped (see data.tokenize.tokenize_text).

    Raises:
        UserError: the special tokens alone fill `max_length`, or the tokenizer cannot make blocks.
    """
    text = join_texts(texts)
    if not text:
        return []
    if isinstance(tokenizer, PreTrainedTokenizer):  # it returns no blocks after the first
        raise UserError(
            "data.text: a tokenizer that is written in Python makes no blocks of text; give "
            "sentence1 in its place"
        )
    _require_room(tokenizer, max_length, is_pair=False)
    blocks = tokenizer(
        [text],
        truncation=True,
        max_length=max_length,
        return_overflowing_tokens=True,
        **_make_options(tokenizer, has_types),
    )
    types = blocks.token_type_ids if has_types else [None] * len(blocks.input_ids)
    return [
        EncodedText(ids, own_types, len(ids))
        for ids, own_types in zip(blocks.input_ids, types, strict=True)
    ]


def describe_pairs(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Say that a tokenizer runs the texts of a pair together; None where special tokens part them."""
    of_pair, of_text = (tokenizer.num_special_tokens_to_add(pair=pair) for pair in (True, False))
    if of_pair > of_text:
        return None
    return "task.sentence2: this tokenizer puts no token between the texts of a pair"


def _require_room(tokenizer: PreTrainedTokenizerBase, max_length: int, is_pair: bool) -> None:
    """Raise UserError if the special tokens of a text or a pair fill `max_length`."""
    num_special = tokenizer.num_special_tokens_to_add(pair=is_pair)
    if max_length <= num_special:
        raise UserError(
            f"data.max_length: {max_length} has no room for text beside {num_special} special "
            "tokens; raise it"
        )


def _make_options(tokenizer: PreTrainedTokenizerBase, has_types: bool) -> dict[str, bool]:
    """Return the arguments of every call of a tokenizer."""
    return {
        "return_attention_mask": False,
        "return_token_type_ids": has_types,
        "verbose": False,
        "split_special_tokens": can_split_special_tokens(tokenizer),
    }
