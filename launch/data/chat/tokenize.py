"""Conversations to token ids, each with a mask of the tokens that the assistant wrote.

The template's special tokens are special tokens. Text of a message that spells one is text, as in
other rows (launch.data.tokenize): it is tokenised apart from what is around it.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from launch.data.chat.messages import Message, MessagesError, read_messages
from launch.data.chat.template import UNCLEAR, ChatTemplate, Span
from launch.data.rows import BadRow, Conversation

SPELLED = "which spells a special token"
# Characters for private use, put around what spells a special token until it is tokenised.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_MARKED = re.compile(f"{_BEGIN}(.*?){_END}", re.DOTALL)


class ChatTokens(NamedTuple):
    """The tokens of one conversation."""

    ids: list[int]
    is_trained: list[int]  # 1 for the assistant's turns (see ChatTemplate.find_turns), else 0
    names: str  # that the messages had (see read_messages)


class _Rendered(NamedTuple):
    """A conversation as text, before it is tokenised."""

    text: str
    turns: list[Span]
    marked: str | None  # the text with marks around what spells special tokens; None without any
    names: str  # that the messages had


def tokenize_conversations(
    rows: Sequence[Conversation],
    template: ChatTemplate,
    field: str,
    train_on: Literal["all", "last"],
) -> Iterator[tuple[Conversation, ChatTokens | BadRow]]:
    """Tokenise conversations; of one that cannot be trained on, yield what is wrong with it.

    Args:
        field: of the rows, for messages.
        train_on: all turns of the assistant, or the last.
    """
    rendered: list[_Rendered | BadRow] = []
    for row in rows:
        try:
            rendered.append(_render_row(row, template, field, train_on))
        except MessagesError as error:
            rendered.append(BadRow(row.number, error.reason, error.what))
    plain = [one.text for one in rendered if isinstance(one, _Rendered) and one.marked is None]
    encodings = iter(_encode(template.tokenizer, plain))
    for row, one in zip(rows, rendered, strict=True):
        if isinstance(one, BadRow):
            yield row, one
            continue
        try:
            encoded = (
                next(encodings) if one.marked is None else _encode_marked(one.marked, template)
            )
        except MessagesError as error:
            yield row, BadRow(row.number, error.reason, error.what)
            continue
        is_trained = _mask_turns(*encoded, one.turns)
        if any(is_trained):
            yield row, ChatTokens(encoded[0], is_trained, one.names)
        else:
            yield row, BadRow(row.number, UNCLEAR, "no token of it is the assistant's")


def encode_question(question: str, template: ChatTemplate) -> list[int]:
    """Tokenise a user's message with the header of the answer to come. Raises MessagesError."""
    messages = _mark(ask(question), template.special)
    ids, _ = _encode_marked(template.render(messages, generate=True), template)
    return ids


def ask(question: str) -> list[Message]:
    """Return the messages of one question."""
    return [{"role": "user", "content": question}]


def _render_row(
    row: Conversation, template: ChatTemplate, field: str, train_on: Literal["all", "last"]
) -> _Rendered:
    """Read and render the messages of one row. Raises MessagesError."""
    messages, names = read_messages(row.messages, field, train_on)
    text, turns = template.find_turns(messages, train_on)
    marked_messages = _mark(messages, template.special)
    if marked_messages == messages:
        return _Rendered(text, turns, None, names)
    marked = template.render(marked_messages)
    if marked.replace(_BEGIN, "").replace(_END, "") != text:
        raise MessagesError(SPELLED, f"it holds text {SPELLED}, which the chat template changes")
    return _Rendered(text, turns, marked, names)


def _mark(value: object, special: re.Pattern) -> object:
    """Put marks around what spells a special token, in all text of a JSON value."""
    if isinstance(value, str):
        return special.sub(f"{_BEGIN}\\g<0>{_END}", value)
    if isinstance(value, list):
        return [_mark(one, special) for one in value]
    if isinstance(value, dict):
        return {key: _mark(one, special) for key, one in value.items()}
    return value


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], split: bool = False
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Tokenise rendered texts, on all cores; the template writes the beginning of sequence itself.

    Args:
        split: whether special tokens are text.

    Yields:
        The token ids of each text, and the characters of each token, (tokens, 2).
    """
    if not texts:
        return
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        split_special_tokens=split,
        verbose=False,
    )
    for encoding in encoded.encodings:
        yield encoding.ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)


def _encode_marked(marked: str, template: ChatTemplate) -> tuple[list[int], np.ndarray]:
    """Tokenise a text with marks: what is within them is text, and tokenised by itself.

    Returns what `_encode` yields, of the text without the marks. Raises MessagesError if the
    tokenizer makes a special token of text.
    """
    tokenizer = template.tokenizer
    # Behind a line end, or tokenizers of SentencePiece's kind would put a space before each piece.
    [(newline, _)] = _encode(tokenizer, ["\n"])
    ids: list[int] = []
    offsets = [np.empty((0, 2), dtype=np.int64)]
    position = 0
    for number, piece in enumerate(_MARKED.split(marked)):
        if not piece:
            continue
        is_text = number % 2 == 1
        before = "\n" if position else ""
        [(found, places)] = _encode(tokenizer, [before + piece], split=is_text)
        skipped = len(newline) if before else 0
        is_whole = not before or found[:skipped] == newline
        if not is_whole or (is_text and not template.special_ids.isdisjoint(found)):
            what = f"it holds text {SPELLED} ({piece[:40]!r}), and this tokenizer cannot split it"
            raise MessagesError(SPELLED, what)
        ids += found[skipped:]
        offsets.append(places[skipped:] + (position - len(before)))
        position += len(piece)
    return ids, np.concatenate(offsets)


def _mask_turns(ids: list[int], offsets: np.ndarray, turns: Sequence[Span]) -> list[int]:
    """Mark by 1 the tokens of turns: from the first that holds one of its characters to the last."""
    is_trained = np.zeros(len(ids), dtype=np.int8)
    starts, ends = offsets.T
    for start, end in turns:
        (inside,) = np.nonzero((starts < end) & (ends > start))
        if len(inside):
            is_trained[inside[0] : inside[-1] + 1] = 1
    return is_trained.tolist()
