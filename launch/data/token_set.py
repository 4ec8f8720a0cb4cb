"""Tokenised training examples: what every later stage reads rows from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from launch.runtime.errors import UserError


@dataclass(frozen=True)
class TokenSet:
    """Tokenised examples, one after another in one tensor on the CPU.

    In training the tensors are memory-mapped files, so no rank holds a copy of its own. Example i
    is `tokens[offsets[i] : offsets[i + 1]]`: a prompt and an answer. The loss counts the tokens of
    the answer.
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

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def lengths(self) -> Tensor:
        """Return the number of tokens of each example, (examples,), int64."""
        return self.offsets.diff()

    def count_answer_tokens(self, examples: Sequence[int]) -> int:
        """Count the tokens of `examples` that the loss counts."""
        if self.is_trained is not None:
            return sum(len(self.find_trained(example)) for example in examples)
        index = torch.as_tensor(examples)
        return int((self.lengths()[index] - self.prompt_lengths[index]).sum())

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
    tokens = torch.tensor([token for piece in pieces for token in piece], dtype=torch.int32)
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
    edge = tokens.offsets[num_training]
    training = replace(
        tokens,
        tokens=tokens.tokens[:edge],
        offsets=tokens.offsets[: num_training + 1],
        prompt_lengths=tokens.prompt_lengths[:num_training],
        is_trained=None if tokens.is_trained is None else tokens.is_trained[:edge],
    )
    held_out = TokenSet(
        tokens=tokens.tokens[edge:],
        offsets=tokens.offsets[num_training:] - edge,
        prompt_lengths=tokens.prompt_lengths[num_training:],
        num_truncated=0,
        num_dropped=0,
        is_trained=None if tokens.is_trained is None else tokens.is_trained[edge:],
    )
    return training, held_out
