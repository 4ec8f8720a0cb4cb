"""Which examples each optimiser step and each rank takes, in an order that no world size changes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

from launch.runtime.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Packing:
    """Several examples in one sequence, with attention kept within each."""

    capacity: int  # tokens of a sequence
    flat: bool  # all sequences of a batch in one row without padding, as FlashAttention takes them


def count_steps(num_examples: int, global_batch: int, epochs: float, max_steps: int | None) -> int:
    """Count the optimiser steps of a run. The last one may have fewer examples."""
    return max_steps or math.ceil(count_rows(num_examples, epochs) / global_batch)


def count_rows(num_examples: int, epochs: float) -> int:
    """Count the rows of all epochs; a part of a row counts as one."""
    return math.ceil(
        num_examples * Fraction(str(epochs))
    )  # 1.1 is eleven tenths, not a little more


def plan_steps(
    num_examples: int, global_batch: int, epochs: float, max_steps: int | None, seed: int
) -> Iterator[list[int]]:
    """Yield the examples of each optimiser step: epoch after epoch, each in a seeded order."""
    generator = torch.Generator().manual_seed(seed)
    remaining = max_steps * global_batch if max_steps else count_rows(num_examples, epochs)
    pending: list[int] = []
    while remaining > 0:
        size = min(global_batch, remaining)
        while len(pending) < size:
            pending += torch.randperm(num_examples, generator=generator).tolist()
        yield pending[:size]
        pending = pending[size:]
        remaining -= size


def describe_idle_ranks(steps: Sequence[Sequence[int]], world_size: int) -> str | None:
    """Say how many ranks have no example of their own in any step; None if there are none.

    Args:
        steps: the examples of each step, over all ranks.
    """
    num_rows = max(map(len, steps))
    if world_size <= num_rows:
        return None
    return (
        f"{world_size - num_rows} of {world_size} ranks have nothing to train on: no step has more "
        f"than {num_rows} rows; start fewer ranks"
    )


def sample_examples(num_examples: int, num_samples: int, seed: int) -> list[int]:
    """Draw `num_samples` distinct examples, in ascending order.

    Raises:
        UserError: there are fewer examples.
    """
    if num_samples > num_examples:
        raise UserError(
            f"calibration.samples: {num_samples} is above the {num_examples} examples that "
            "there are; lower it"
        )
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(num_examples, generator=generator)
    return shuffled[:num_samples].sort().values.tolist()


def shard_batches(
    items: Sequence[T], rank: int, world_size: int, size: int
) -> list[list[T | None]]:
    """Return this rank's batches of `items`, each of `size` items, None in the place of missing ones.

    Batch i of the whole list goes to rank i mod world_size, so what a batch holds does not depend
    on the world size. Every rank gets equally many batches: ranks that hold shards of a model
    must run it equally often.
    """
    num_batches = math.ceil(len(items) / size)
    num_per_rank = math.ceil(num_batches / world_size)
    batches = []
    for i in range(num_per_rank):
        start = (i * world_size + rank) * size
        batch: list[T | None] = list(items[start : start + size])
        batch += [None] * (size - len(batch))
        batches.append(batch)
    return batches


def plan_micro_batches(
    examples: Sequence[int],
    lengths: Tensor,
    rank: int,
    world_size: int,
    micro_batch: int,
    packing: Packing | None,
) -> list[list[list[int] | None]]:
    """Return this rank's micro batches of one step: lists of sequences, each a list of examples.

    Sequences of similar length come together, for little padding: those of one batch, and those
    that ranks run at the same time, since a sharded rank waits for the slowest one at every layer.
    Which sequences a step has depends on neither the world size nor the micro batch.

    Args:
        examples: of the step, over all ranks.
        lengths: (all examples,), tokens of each.
        micro_batch: most sequences of a batch; fewer where all ranks together have fewer.
        packing: None where every example is a sequence of its own.

    Returns:
        Equally many batches on every rank; None is a sequence of weight 0.
    """
    own_lengths = dict(zip(examples, lengths[torch.as_tensor(examples)].tolist(), strict=True))
    longest_first = sorted(examples, key=lambda example: -own_lengths[example])
    if packing:
        sequences = pack_examples(longest_first, own_lengths, packing.capacity)
    else:
        sequences = [[example] for example in longest_first]
    size = min(micro_batch, math.ceil(len(sequences) / world_size))
    return shard_batches(sequences, rank, world_size, size)


def pack_examples(
    examples: Sequence[int], lengths: Mapping[int, int], capacity: int
) -> list[list[int]]:
    """Pack examples, longest first, each into the first sequence that has room for it.

    First fit decreasing: at most 11/9 of the fewest possible sequences, plus one.

    Args:
        lengths: example -> its tokens.

    Returns:
        The examples of each sequence, the fullest sequences first.
    """
    sequences: list[list[int]] = []
    room: list[int] = []  # tokens left in each sequence
    for example in examples:
        length = lengths[example]
        index = next((i for i, left in enumerate(room) if left >= length), None)
        if index is None:
            index = len(sequences)
            sequences.append([])
            room.append(capacity)
        sequences[index].append(example)
        room[index] -= length
    fullest_first = sorted(range(len(sequences)), key=lambda i: room[i])
    return [sequences[i] for i in fullest_first]
