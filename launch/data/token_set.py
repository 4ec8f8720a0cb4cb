"""Tokenised training examples: what every later stage reads rows from."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from launch.runtime import watchdog
from launch.runtime.errors import UserError


@dataclass(frozen=True)
class TokenSet:
    """Tokenised examples, one after another in one tensor on the CPU.

    In training the tensors are memory-mapped files, so no rank holds a copy of its own. Example i
    is `tokens[offsets[i] : offsets[i + 1]]`: a prompt and an answer, of which the loss counts the
    answer's tokens; or, with `labels`, the texts of a row, which the loss counts once.
    """

    tokens: Tensor  # (all tokens,), int32
    offsets: Tensor  # (examples + 1,), int64
    prompt_lengths: Tensor  # (examples,), int64: tokens before the first one that the loss counts
    num_truncated: int  # examples whose answer was cut at max_length
    num_dropped: int  # rows left out because they are bad, or no answer token fits max_length
    num_special: int = 0  # examples in whose text the tokenizer finds special tokens
    # Of messages: (all tokens,), int8, 1 where the loss counts a token. None where it counts all from
    # the prompt's end on.
    is_trained: Tensor | None = None
    labels: Tensor | None = None  # (examples,): int64 places in task.labels, or fp64 numbers
    # As tokens, int8: 1 in a pair's second text. None where models take none.
    token_types: Tensor | None = None
    pad_token: int = 0  # id that fills up rows with labels

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def lengths(self) -> Tensor:
        """Return the number of tokens of each example, (examples,), int64."""
        return self.offsets.diff()

    def count_answer_tokens(self, examples: Sequence[int]) -> int:
        """Count what the loss counts of `examples`: their answers' tokens, or labels."""
        if self.labels is not None:
            return len(examples)
        if self.is_trained is not None:
            return sum(len(self.find_trained(example)) for example in examples)
        index = torch.as_tensor(examples)
        lengths = self.offsets[index + 1] - self.offsets[index]  # of these alone
        return int((lengths - self.prompt_lengths[index]).sum())

    def find_trained(self, example: int) -> Tensor:
        """Return the places of the tokens of an example that the loss counts, int64, in order.

        The first token of an example has none before it that could predict it.
        """
        start, end = self.offsets[example : example + 2].tolist()
        first = max(1, int(self.prompt_lengths[example]))
        if self.is_trained is None:
            return torch.arange(first, end - start)
        return first + self.is_trained[start + first : end].nonzero()[:, 0]


def make_text_set(pieces: Sequence[Sequence[int]]) -> TokenSet:
    """Make a TokenSet of running text: in each piece every token but the first counts."""
    tokens = torch.tensor(list(chain.from_iterable(pieces)), dtype=torch.int32)
    offsets = torch.tensor([0, *map(len, pieces)]).cumsum(0)
    ones = torch.ones(len(pieces), dtype=torch.int64)
    return TokenSet(tokens, offsets, ones, num_truncated=0, num_dropped=0)


def split_held_out(tokens: TokenSet, num_held_out: int) -> tuple[TokenSet, TokenSet | None]:
    """Split off the last `num_held_out` examples, which are never trained or calibrated on.

    Returns:
        The training examples and the held-out ones, None for 0.

    Raises:
        UserError: no example would be left to train on.
    """
    if num_held_out == 0:
        return tokens, None
    num_training = len(tokens) - num_held_out
    if num_training < 1:
        raise UserError(
            f"data.held_out: {num_held_out} of {len(tokens)} rows leave none to train on; lower it"
        )
    training = _cut_examples(tokens, 0, num_training)
    held_out = _cut_examples(tokens, num_training, len(tokens))
    return training, replace(held_out, num_truncated=0, num_dropped=0, num_special=0)


def count_shared(sets: Iterable[Iterable[bytes]], used: Iterable[bytes]) -> list[int]:
    """Count in each set the examples that are used too: data sets have rows twice.

    Args:
        sets: of examples that are kept apart, each its tokens, as `read_bytes` gives them.
        used: of examples that are trained or calibrated on, likewise; read once for all sets.
    """
    contents = [list(examples) for examples in sets]
    wanted = set().union(*contents)
    found = {content for content in used if content in wanted} if wanted else set()
    return [sum(content in found for content in examples) for examples in contents]


def read_bytes(tokens: TokenSet, examples: Iterable[int]) -> Iterator[bytes]:
    """Yield the bytes of each example's tokens."""
    content, offsets = tokens.tokens.numpy(), tokens.offsets.numpy()  # slices of tensors are slow
    for example in examples:
        watchdog.heartbeat()
        yield content[offsets[example] : offsets[example + 1]].tobytes()


def _cut_examples(tokens: TokenSet, start: int, stop: int) -> TokenSet:
    """Return the examples from `start` to before `stop`."""
    first, end = tokens.offsets[start], tokens.offsets[stop]
    return replace(
        tokens,
        tokens=tokens.tokens[first:end],
        offsets=tokens.offsets[start : stop + 1] - first,
        prompt_lengths=tokens.prompt_lengths[start:stop],
        is_trained=None if tokens.is_trained is None else tokens.is_trained[first:end],
        labels=None if tokens.labels is None else tokens.labels[start:stop],
        token_types=None if tokens.token_types is None else tokens.token_types[first:end],
    )
