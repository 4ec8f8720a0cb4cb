"""Rows to prompts to token batches, in one global order that no world size changes."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from astra.moments import Batch
from eval.tasks.base import ALPACA
from launch.data.sources import Row
from launch.runtime.errors import UserError

# Alpaca's prompt of a row with an input that is not empty (tatsu-lab/stanford_alpaca, train.py).
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


@dataclass(frozen=True)
class TokenSet:
    """Tokenised rows, end to end on the CPU: in training, memory-mapped files that no rank copies whole.

    Row i is `tokens[offsets[i]:offsets[i + 1]]`.
    """

    tokens: Tensor  # (total tokens,), int32
    offsets: Tensor  # (rows + 1,), int64
    answer_starts: (
        Tensor  # (rows,), int64: index in its row of the first token that holds part of the answer
    )
    num_cut: int  # rows whose answer was shortened to fit max_length
    num_left_out: int  # rows left out, because they are bad or no answer token fitted

    def __len__(self) -> int:
        return len(self.answer_starts)

    def lengths(self) -> Tensor:
        """(rows,), tokens of each row."""
        return self.offsets.diff()

    def answer_tokens(self, rows: Sequence[int]) -> int:
        """Tokens of `rows` that the loss counts."""
        index = torch.as_tensor(rows)
        return int((self.lengths()[index] - self.answer_starts[index]).sum())


def prompt(instruction: str, more: str = "") -> str:
    """The prompt of one instruction, for calibration, training and evaluation alike; `more` is a row's input."""
    return (
        ALPACA_INPUT.format(instruction=instruction, input=more)
        if more
        else ALPACA.format(instruction=instruction)
    )


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids with the tokenizer's own beginning-of-sequence token and no end-of-sequence token."""
    rows = tokenizer(texts, return_attention_mask=False, verbose=False).input_ids if texts else []
    return [row[:-1] if row and row[-1] == tokenizer.eos_token_id else row for row in rows]


def tokenise(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], int]]:
    """Of each row, its tokens, prompt + answer + newline + EOS, and where in them the answer starts.

    The loss counts every token that holds part of the answer: those after the longest common beginning of the prompt's
    own tokens and the whole text's. A fast tokenizer uses all cores.
    """
    prompts = [prompt(row.instruction, row.input) for row in rows]
    begins = encode(tokenizer, prompts)
    wholes = encode(
        tokenizer, [text + row.answer + "\n" for text, row in zip(prompts, rows, strict=True)]
    )
    for begin, whole in zip(begins, wholes, strict=True):
        whole = [*whole, tokenizer.eos_token_id]
        if whole[: len(begin)] == begin:
            yield whole, len(begin)
        else:
            pairs = zip(begin, whole, strict=False)
            yield whole, next((i for i, (a, b) in enumerate(pairs) if a != b), len(whole))


def collate(
    tokens: TokenSet, rows: Sequence[int | None], device: torch.device
) -> tuple[Batch, Tensor]:
    """Right-padded batch of `rows`, and labels with -100 where the loss does not count; both (rows, tokens).

    A row that is None is a dummy of weight 0: a copy of a row beside it with nothing counted.
    """
    real = next((row for row in rows if row is not None), 0)
    pieces = []
    for row in rows:
        index = real if row is None else row
        pieces.append(tokens.tokens[tokens.offsets[index] : tokens.offsets[index + 1]].long())
    input_ids = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=0)
    lengths = torch.tensor([len(piece) for piece in pieces])[:, None]
    is_real = torch.tensor([row is not None for row in rows])[:, None]
    starts = torch.tensor([0 if row is None else int(tokens.answer_starts[row]) for row in rows])[
        :, None
    ]
    counted = (torch.arange(input_ids.shape[1]) < lengths) & is_real
    labels = input_ids.masked_fill(~counted | (torch.arange(input_ids.shape[1]) < starts), -100)
    return Batch(input_ids=input_ids.to(device), counted=counted.to(device)), labels.to(device)


def deal(items: Sequence[int], rank: int, world_size: int, size: int) -> list[list[int | None]]:
    """This rank's share of `items` in batches of `size`, filled up with None so that every rank has as many.

    Batch i of the whole list goes to rank i mod world_size: what a batch holds does not depend on world size.
    """
    batches = math.ceil(len(items) / size)
    per_rank = math.ceil(batches / world_size)
    share = []
    for i in range(per_rank):
        start = (i * world_size + rank) * size
        batch: list[int | None] = list(items[start : start + size])
        share.append(batch + [None] * (size - len(batch)))
    return share


def choose(num_rows: int, samples: int, seed: int) -> list[int]:
    """`samples` distinct row ids, a seeded choice, ascending. Raises UserError if there are fewer rows."""
    if samples > num_rows:
        raise UserError(
            f"calibration.samples: {samples} is above the {num_rows} training rows; lower it"
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_rows, generator=generator)[:samples].sort().values.tolist()


def num_steps(num_rows: int, global_batch: int, epochs: float, max_steps: int | None) -> int:
    """Optimiser steps of a run; the last one may be short of rows."""
    return max_steps or math.ceil(num_rows * epochs / global_batch)


def step_rows(
    num_rows: int, global_batch: int, epochs: float, max_steps: int | None, seed: int
) -> Iterator[list[int]]:
    """The row ids of each optimiser step: epoch after epoch in seeded order, independent of world size."""
    generator = torch.Generator().manual_seed(seed)
    left = max_steps * global_batch if max_steps else math.ceil(num_rows * epochs)
    pending: list[int] = []
    while left > 0:
        while len(pending) < min(global_batch, left):
            pending += torch.randperm(num_rows, generator=generator).tolist()
        step = pending[: min(global_batch, left)]
        pending = pending[len(step) :]
        left -= len(step)
        yield step
