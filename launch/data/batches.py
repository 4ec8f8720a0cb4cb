"""One optimiser step's rows as the batches of its forward passes: padded or packed, dealt to ranks, made ahead."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from launch.config.schema import Recipe
from launch.data.tokenize import TokenSet, deal

T = TypeVar("T")


@dataclass(frozen=True)
class Packing:
    """Several rows to a sequence, attention kept within each."""

    capacity: int  # tokens of a sequence
    flat: bool  # a batch's sequences in one row without padding, as FlashAttention takes them


def packing_of(recipe: Recipe, base: PreTrainedModel) -> Packing | None:
    """How `recipe` packs the rows that `base` trains on."""
    flat = base.config._attn_implementation == "flash_attention_2"
    return Packing(recipe.data.max_length, flat) if recipe.data.packing else None


@dataclass(frozen=True)
class TrainBatch:
    """What `AnswerLoss` takes."""

    input_ids: Tensor  # (rows, tokens), int64, padded on the right
    positions: (
        Tensor  # (n,), int64, in the flattened input_ids: the tokens whose next one the loss counts
    )
    targets: Tensor  # (n,), int64: those next tokens
    position_ids: (
        Tensor | None
    )  # (rows, tokens), int64, each example's from 0; None if every row is one example

    def to(self, device: torch.device) -> "TrainBatch":
        """On `device`, without waiting for it."""
        parts = (self.input_ids, self.positions, self.targets, self.position_ids)
        return TrainBatch(
            *(part if part is None else part.to(device, non_blocking=True) for part in parts)
        )

    def pinned(self) -> "TrainBatch":
        """In memory from which a copy to a GPU need not wait."""
        parts = (self.input_ids, self.positions, self.targets, self.position_ids)
        return TrainBatch(*(part if part is None else part.pin_memory() for part in parts))


def make_share(
    rows: Sequence[int],
    lengths: Tensor,
    rank: int,
    world_size: int,
    micro_batch: int,
    packing: Packing | None,
) -> list[list[list[int] | None]]:
    """This rank's batches of the rows of one step; as many on every rank, sequences of weight 0 (None) included.

    Sequences of like length come together, for little padding: those of one batch, and those that ranks run at the
    same time, since a sharded rank waits for the slowest at every layer. What a step's sequences are depends on neither
    world size nor micro batch.

    Args:
        micro_batch: sequences of a batch, at most; fewer where all ranks together have not so many.
        packing: None: every row is a sequence.
    """
    ordered = sorted(rows, key=lambda row: -lengths[row])
    sequences = pack(ordered, lengths, packing.capacity) if packing else [[row] for row in ordered]
    return deal(
        sequences, rank, world_size, min(micro_batch, math.ceil(len(sequences) / world_size))
    )


def pack(rows: Sequence[int], lengths: Tensor, capacity: int) -> list[list[int]]:
    """`rows`, longest first, each into the first sequence that has room for it; fullest sequences first.

    Needs at most 11/9 of the fewest possible sequences, plus one (first fit decreasing).
    """
    packed: list[list[int]] = []
    room: list[int] = []
    for row in rows:
        length = int(lengths[row])
        fits = next((i for i, left in enumerate(room) if left >= length), None)
        if fits is None:
            fits = len(packed)
            packed.append([])
            room.append(capacity)
        packed[fits].append(row)
        room[fits] -= length
    return [packed[i] for i in sorted(range(len(packed)), key=lambda i: room[i])]


def collate(
    tokens: TokenSet, sequences: Sequence[Sequence[int] | None], packing: Packing | None
) -> TrainBatch:
    """The batch of `sequences`, each of one or more rows, on the CPU.

    A sequence that is None weighs nothing: the first row of the one before it, or row 0, with nothing counted.
    """
    filler = next((rows[0] for rows in reversed(sequences) if rows is not None), 0)
    pieces = [
        [
            tokens.tokens[tokens.offsets[row] : tokens.offsets[row + 1]]
            for row in ([filler] if rows is None else rows)
        ]
        for rows in sequences
    ]
    width = max(sum(map(len, examples)) for examples in pieces)
    places, at = [torch.empty(0, dtype=torch.int64)], 0
    for number, (rows, examples) in enumerate(zip(sequences, pieces, strict=True)):
        at = at if packing and packing.flat else number * width
        for i, example in enumerate(examples):
            if rows is not None:
                answer = max(1, int(tokens.answer_starts[rows[i]]))
                places.append(torch.arange(at + answer - 1, at + len(example) - 1))
            at += len(example)

    def together(parts: list[list[Tensor]]) -> Tensor:
        # Padding is 0, also as a position: each such token is then an example of its own.
        joined = [torch.cat(part).long() for part in parts]
        return (
            torch.cat(joined)[None]
            if packing and packing.flat
            else nn.utils.rnn.pad_sequence(joined, batch_first=True)
        )

    input_ids, positions = together(pieces), torch.cat(places)
    position_ids = together(
        [[torch.arange(len(piece)) for piece in examples] for examples in pieces]
    )
    return TrainBatch(
        input_ids, positions, input_ids.flatten()[positions + 1], position_ids if packing else None
    )


def ahead(items: Iterator[T], device: torch.device) -> Iterator[T]:
    """`items`, each made by a thread while the one before it is used."""
    end = object()

    def begin() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # pinning memory would else make a context on GPU 0

    with ThreadPoolExecutor(1, initializer=begin) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item
