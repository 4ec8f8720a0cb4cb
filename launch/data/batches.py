"""Examples as the tensors of one forward pass, padded or packed, and made ahead of their use.

Rows with labels (data.task_rows) are padded on the right with the tokenizer's padding token, and an
attention mask leaves the padding out: an encoder's tokens would see it otherwise.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from astra.moments import Batch, get_row_inputs
from launch.data.order import Packing
from launch.data.token_set import TokenSet

T = TypeVar("T")
IGNORED = -100  # a label that PyTorch's cross-entropy leaves out


class LossBatch:
    """A batch of training: its fields are the arguments of a loss's forward pass, in their order."""

    def to(self, device: torch.device) -> Self:
        """Copy to `device`, without waiting for the copy."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Copy to page-locked memory, from which a copy to a GPU runs in the background."""
        return self._map_tensors(Tensor.pin_memory)

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(
            *(value if value is None else function(value) for value in self.arguments())
        )

    def arguments(self) -> tuple[Tensor | None, ...]:
        """Return the arguments of the loss's forward pass."""
        return tuple(vars(self).values())


@dataclass(frozen=True)
class TrainBatch(LossBatch):
    """One micro batch of training, as training.loss.AnswerLoss takes it."""

    # (sequences, tokens), int64, padded on the right; (1, tokens), unpadded, with Packing.flat.
    input_ids: Tensor
    # (n,), int64: places in the flattened input_ids whose next token the loss counts.
    loss_indices: Tensor
    # (n,), int64: those next tokens.
    targets: Tensor
    # As input_ids, counted from 0 in each example; None without packing.
    position_ids: Tensor | None


@dataclass(frozen=True)
class RowBatch(LossBatch):
    """One batch of rows with labels, as training.row_loss.RowLoss takes it."""

    input_ids: Tensor  # (rows, tokens), int64, padded on the right
    attention_mask: Tensor  # (rows, tokens), int64: 0 at padding
    token_type_ids: Tensor | None  # (rows, tokens), int64; where the model takes them
    labels: Tensor  # (rows,): int64 places in task.labels, or fp32 numbers
    weights: Tensor  # (rows,), fp64: 0 for a row that fills a batch up, else 1

    def inputs(self) -> dict[str, Tensor]:
        """Return the arguments of the model's forward pass."""
        return get_row_inputs(vars(self))


def collate_rows(tokens: TokenSet, examples: Sequence[int | None]) -> RowBatch:
    """Make the batch of rows with labels, on the CPU.

    None fills a batch up: it repeats a row of the batch, or row 0, and has weight 0.
    """
    filler = next((example for example in reversed(examples) if example is not None), 0)
    chosen = [filler if example is None else example for example in examples]
    pieces = [_get_example(tokens, example).long() for example in chosen]
    masks = [torch.ones_like(piece) for piece in pieces]
    types = None
    if tokens.token_types is not None:
        spans = [slice(*tokens.offsets[example : example + 2]) for example in chosen]
        types = _pad([tokens.token_types[span].long() for span in spans])
    labels = tokens.labels[torch.tensor(chosen)]
    return RowBatch(
        input_ids=_pad(pieces, tokens.pad_token),
        attention_mask=_pad(masks),
        token_type_ids=types,
        labels=labels.float() if labels.is_floating_point() else labels,
        weights=torch.tensor([float(i is not None) for i in examples], dtype=torch.float64),
    )


def _pad(rows: list[Tensor], value: int = 0) -> Tensor:
    """Pad rows on the right: (rows, tokens)."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def make_model_inputs(
    tokens: TokenSet, examples: Sequence[int], device: torch.device
) -> dict[str, Tensor | bool]:
    """Make the arguments of the model's forward pass on a batch of `examples`."""
    if tokens.labels is not None:
        return collate_rows(tokens, examples).to(device).inputs()
    batch, _ = collate_examples(tokens, examples, device)
    return {"input_ids": batch["input_ids"], "use_cache": False}


def collate_sequences(
    tokens: TokenSet, sequences: Sequence[Sequence[int] | None], packing: Packing | None
) -> TrainBatch:
    """Make the micro batch of `sequences`, each of one or more examples, on the CPU.

    None fills a batch up, since all ranks must run equally many. It repeats an example of the
    batch, or example 0, and the loss counts none of it.
    """
    filler = next((examples[0] for examples in reversed(sequences) if examples is not None), 0)
    pieces: list[list[Tensor]] = []  # of each sequence, the tokens of its examples
    for examples in sequences:
        pieces.append([_get_example(tokens, i) for i in examples or [filler]])
    flat = packing is not None and packing.flat
    indices = _find_loss_indices(tokens, sequences, pieces, flat)
    input_ids = _join_pieces(pieces, flat)
    position_ids = None
    if packing is not None:
        positions = [[torch.arange(len(piece)) for piece in examples] for examples in pieces]
        position_ids = _join_pieces(positions, flat)
    return TrainBatch(input_ids, indices, input_ids.flatten()[indices + 1], position_ids)


def _find_loss_indices(
    tokens: TokenSet,
    sequences: Sequence[Sequence[int] | None],
    pieces: list[list[Tensor]],
    flat: bool,
) -> Tensor:
    """Find the places, in the flattened batch, whose next token is part of an answer."""
    width = max(sum(map(len, examples)) for examples in pieces)
    indices = [torch.empty(0, dtype=torch.int64)]
    start = 0  # of the next example, in the flattened batch
    for number, (examples, sequence_pieces) in enumerate(zip(sequences, pieces, strict=True)):
        if not flat:
            start = number * width
        for i, piece in enumerate(sequence_pieces):
            if examples is not None:
                indices.append(start - 1 + tokens.find_trained(examples[i]))
            start += len(piece)
    return torch.cat(indices)


def _join_pieces(pieces: list[list[Tensor]], flat: bool) -> Tensor:
    """Join the pieces of each sequence: (1, tokens) if `flat`, else (sequences, tokens), padded.

    Padding is 0, also as a position id: each such token is then an example of its own.
    """
    joined = [torch.cat(examples).long() for examples in pieces]
    if flat:
        return torch.cat(joined)[None]
    return nn.utils.rnn.pad_sequence(joined, batch_first=True)


def collate_examples(
    tokens: TokenSet, examples: Sequence[int | None], device: torch.device
) -> tuple[Batch, Tensor]:
    """Make a right-padded batch of calibration or measurement.

    An example that is None has weight 0: it repeats another one, and none of its tokens counts.

    Returns:
        The batch, and its labels: (examples, tokens), int64, IGNORED where the loss does not count.
        Labels are not shifted: the label of a token is that token.
    """
    filler = next((example for example in examples if example is not None), 0)
    pieces = []
    for example in examples:
        pieces.append(_get_example(tokens, filler if example is None else example).long())
    input_ids = nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=0)
    columns = torch.arange(input_ids.shape[1])
    lengths = [
        0 if example is None else len(piece)
        for example, piece in zip(examples, pieces, strict=True)
    ]
    starts = [0 if example is None else int(tokens.prompt_lengths[example]) for example in examples]
    token_mask = columns < torch.tensor(lengths)[:, None]
    is_answer = token_mask & (columns >= torch.tensor(starts)[:, None])
    if tokens.is_trained is not None:
        masks = []
        for piece, example in zip(pieces, examples, strict=True):
            start = tokens.offsets[filler if example is None else example]
            masks.append(tokens.is_trained[start : start + len(piece)])
        is_answer &= nn.utils.rnn.pad_sequence(masks, batch_first=True).bool()
    labels = input_ids.masked_fill(~is_answer, IGNORED)
    batch = Batch(input_ids=input_ids.to(device), token_mask=token_mask.to(device))
    return batch, labels.to(device)


def _get_example(tokens: TokenSet, example: int) -> Tensor:
    return tokens.tokens[tokens.offsets[example] : tokens.offsets[example + 1]]


def prefetch(items: Iterator[T], device: torch.device) -> Iterator[T]:
    """Yield `items`, each made by a thread while the one before it is used."""
    end = object()

    def use_device() -> None:
        if device.type == "cuda":
            # Without this, pinning memory in the thread would make a CUDA context on GPU 0.
            torch.cuda.set_device(device)

    with ThreadPoolExecutor(1, initializer=use_device) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item
