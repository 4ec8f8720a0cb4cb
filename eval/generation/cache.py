"""Rows of prompts that are decoded together, and their cache of keys and values.

Rows join and leave while the others run, and each step writes into free columns of the cache.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

FREE_COLUMNS = 32  # that a cache grows by


class RunningBatch(NamedTuple):
    """The rows that a rank decodes together, aligned at the right."""

    prompts: list[int]  # index of each row's prompt
    cache: Cache  # of all tokens but the last
    mask: Tensor  # int64 (rows, width of the cache): 1 for a token, 0 for padding at the left
    last: Tensor  # int64 (rows,): each row's newest token


class RoomyLayer(DynamicLayer):
    """Keys and values with free columns at the right.

    A step writes its own columns and copies none of the others, as transformers' layer does.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Append columns of shape (rows, heads, columns, head size); return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
            self.room = self.keys, self.values
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if self.room[0].shape[-2] < end:
            more = (0, 0, 0, end - start + FREE_COLUMNS)
            self.room = pad(self.keys, more), pad(self.values, more)
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[..., start:end, :] = new
        # Views: attention reads the filled columns, and nothing is copied.
        self.keys, self.values = (room[..., :end, :] for room in self.room)
        return self.keys, self.values

    def select_rows(self, rows: Tensor, width: int) -> None:
        """Keep only some rows, and only their last `width` columns."""
        self.keys = self.keys[rows, :, -width:]
        self.values = self.values[rows, :, -width:]
        self.room = self.keys, self.values


def make_cache() -> Cache:
    """Return an empty cache of `RoomyLayer`."""
    return Cache(layer_class_to_replicate=RoomyLayer)


def can_join_rows(config: PreTrainedConfig) -> bool:
    """Return whether rows of different ages can run together.

    They can if every layer caches nothing but the keys and values of each token.
    """
    layers = DynamicCache(config=config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def select_rows(batch: RunningBatch, rows: list[int], trim: bool) -> RunningBatch:
    """Return a batch of some rows.

    Args:
        trim: drop the columns in which none of them has a token. Needs a cache of `RoomyLayer`.
    """
    selected = torch.tensor(rows, device=batch.mask.device)
    mask = batch.mask[selected]
    if trim:
        # Rows are aligned at the right, so the longest of them has the first column.
        width = int(mask.sum(1).max())
        mask = mask[:, -width:]
        for layer in batch.cache.layers:
            layer.select_rows(selected, width)
    else:
        batch.cache.reorder_cache(selected)
    prompts = [batch.prompts[row] for row in rows]
    return RunningBatch(prompts, batch.cache, mask, batch.last[selected])


def join_batches(a: RunningBatch, b: RunningBatch) -> RunningBatch:
    """Return the rows of both batches, padded at the left to the same width."""
    width = max(a.mask.shape[1], b.mask.shape[1])
    cache = make_cache()
    layers = zip(a.cache.layers, b.cache.layers, strict=True)
    for number, (x, y) in enumerate(layers):
        keys = _join_columns(x.keys, y.keys, width)
        values = _join_columns(x.values, y.values, width)
        cache.update(keys, values, number)
    masks = [pad(mask, (width - mask.shape[1], 0)) for mask in (a.mask, b.mask)]
    last = torch.cat([a.last, b.last])
    return RunningBatch(a.prompts + b.prompts, cache, torch.cat(masks), last)


def _join_columns(x: Tensor, y: Tensor, width: int) -> Tensor:
    return torch.cat([pad(part, (0, 0, width - part.shape[-2], 0)) for part in (x, y)])
