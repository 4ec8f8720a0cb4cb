"""Generate with transformers: a batch takes new prompts as responses end, on all ranks together.

transformers' own continuous batching cannot take the same steps on every rank, as the shards of a
model must.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from eval.generation.cache import RunningBatch, join_batches, select_rows
from eval.generation.decoding import (
    Completion,
    Decoder,
    cut_response,
    decode_tokens,
    make_decoder,
    read_prompts,
)

FIRST_INTERVAL = 8  # steps, while no response has ended


@dataclass
class _Schedule:
    """What every rank runs, and how far each prompt is.

    Every rank holds the same copy, so all take the same steps. All they exchange is the responses
    that have ended, at every look.
    """

    limits: list[int]  # the most new tokens of each prompt
    waiting: deque[int]  # prompts, by index
    running: list[list[int]]  # the prompts of each rank
    counts: list[int]  # new tokens that each prompt has
    # For each response that has ended, the tokens decoded up to the look that found its end. They
    # include the tokens after the end, which are cut off.
    ended_steps: list[int] = field(default_factory=list)


@torch.no_grad()
def generate_responses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    num_positions: int | None,
    max_new_tokens: int,
    batch_size: int,
    device: torch.device,
    sharded: bool,
    end_tokens: Sequence[int],
    stops: Sequence[str] = (),
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
) -> Iterator[dict[int, Completion | None]]:
    """Generate the response to each prompt up to an end token or a stop. Collective.

    Every few steps, all ranks look at which responses have ended. These leave the batch, and
    waiting prompts, the longest first, take their places. So no short response waits for a long
    one, and no rank for another. A model that caches more than the keys and values of each token,
    such as the states of convolutions, runs one batch after another.

    Args:
        model: a causal LM in eval mode. Its own generation settings (repetition_penalty, ...) do
            not count.
        prompts: token ids. A prompt that fills the model's context has None for a response.
        num_positions: of the model's context; None where there is no limit.
        max_new_tokens: for each prompt; fewer if the model's context ends before.
        batch_size: prompts that run together on a rank.
        sharded: ranks hold shards of the model, so all of them must run as many forward passes.
        end_tokens: that end a response; see decoding.find_end_tokens.
        stops: texts that end a response; they and what follows are cut off.
        temperature: 0 is greedy; else each prompt's tokens are drawn with its own seed.
        seeds: one for each prompt; needed if the temperature is above 0.

    Yields:
        {index of a prompt: its response} of those that have ended since the last yield; equal on
        every rank.

    Raises:
        EvalError: the model has no cache of keys and values, such as Mamba.
    """
    rank, world_size = _get_rank()
    overlong = find_overlong_prompts(prompts, num_positions)
    if overlong:
        yield dict.fromkeys(overlong, None)
    schedule = _make_schedule(prompts, num_positions, max_new_tokens, world_size)
    decoder = make_decoder(model, num_positions, device, temperature, seeds)
    batch: RunningBatch | None = None
    tokens: dict[int, list[int]] = {}  # new tokens of the prompts that this rank runs
    while schedule.waiting or any(schedule.running):
        admitted = _admit_prompts(schedule, batch_size, decoder.joins_rows)
        batch = _drop_ended_rows(batch, tokens, decoder, sharded)
        batch = _add_rows(batch, tokens, admitted, rank, decoder, prompts, sharded)
        batch = _advance_rows(schedule, batch, tokens, decoder)
        ended = _take_ended(tokens, schedule.limits, tokenizer, end_tokens, stops)
        ended = _gather_responses(ended, world_size)
        if ended:
            _record_ended(schedule, ended)
            yield ended


def find_overlong_prompts(prompts: Sequence[list[int]], num_positions: int | None) -> list[int]:
    """Return the indices of prompts that leave no room for a new token in the model's context."""
    if num_positions is None:
        return []
    return [i for i, prompt in enumerate(prompts) if len(prompt) >= num_positions]


def _get_rank() -> tuple[int, int]:
    """Return this process' rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _make_schedule(
    prompts: Sequence[list[int]], num_positions: int | None, max_new_tokens: int, world_size: int
) -> _Schedule:
    """Return a schedule in which every prompt that fits the context waits, the longest first."""
    limits = [max_new_tokens] * len(prompts)
    if num_positions is not None:
        limits = [min(max_new_tokens, num_positions - len(prompt)) for prompt in prompts]
    waiting = [i for i, limit in enumerate(limits) if limit > 0]
    # The longest first, so that a prompt that joins later seldom widens the cache.
    waiting.sort(key=lambda i: (-len(prompts[i]), i))
    running: list[list[int]] = [[] for _ in range(world_size)]
    return _Schedule(limits, deque(waiting), running, counts=[0] * len(prompts))


def _admit_prompts(schedule: _Schedule, batch_size: int, joins_rows: bool) -> list[list[int]]:
    """Move waiting prompts to the ranks that run fewest, up to `batch_size` on each.

    Args:
        joins_rows: whether the model's cache lets new rows enter a running batch. If it does not,
            no prompt is moved until all that run have ended.

    Returns:
        The new prompts of each rank.
    """
    running = schedule.running
    admitted: list[list[int]] = [[] for _ in running]
    if any(running) and not joins_rows:
        return admitted
    while schedule.waiting:
        rank = min(range(len(running)), key=lambda rank: len(running[rank]))
        if len(running[rank]) >= batch_size:
            break
        index = schedule.waiting.popleft()
        admitted[rank].append(index)
        running[rank].append(index)
    return admitted


def _drop_ended_rows(
    batch: RunningBatch | None, tokens: dict[int, list[int]], decoder: Decoder, sharded: bool
) -> RunningBatch | None:
    """Return the rows of `batch` that still run, or None if there are none."""
    if batch is None:
        return None
    rows = [row for row, i in enumerate(batch.prompts) if i in tokens]
    if not rows and sharded:
        rows = [0]  # it has ended, but a rank without prompts must run as many forward passes
    return select_rows(batch, rows, trim=decoder.joins_rows) if rows else None


def _add_rows(
    batch: RunningBatch | None,
    tokens: dict[int, list[int]],
    admitted: list[list[int]],
    rank: int,
    decoder: Decoder,
    prompts: Sequence[list[int]],
    sharded: bool,
) -> RunningBatch | None:
    """Read the prompts that were admitted to this rank, and join them with `batch`.

    Each gets its first token in `tokens`.
    """
    own = admitted[rank]
    to_read = own
    if not own and sharded:
        # Another rank's prompt, read for nothing, so that all ranks run as many forward passes.
        to_read = list(chain.from_iterable(admitted))[:1]
    if not to_read:
        return batch
    fresh = read_prompts(decoder, to_read, prompts)
    for i, token in zip(fresh.prompts, fresh.last.tolist(), strict=True):
        if i in own:
            tokens[i] = [token]
    if batch is None or not decoder.joins_rows:  # then all rows of `batch` have ended
        return fresh
    return join_batches(batch, fresh) if own else batch


def _advance_rows(
    schedule: _Schedule,
    batch: RunningBatch | None,
    tokens: dict[int, list[int]],
    decoder: Decoder,
) -> RunningBatch | None:
    """Decode until the next look at what has ended, and add the new tokens to `tokens`."""
    running = list(chain.from_iterable(schedule.running))
    for i in running:
        schedule.counts[i] = max(schedule.counts[i], 1)  # reading a prompt gives its first token
    most_left = max(schedule.limits[i] - schedule.counts[i] for i in running)
    num_steps = min(_choose_interval(schedule.ended_steps), most_left)
    if batch is not None:
        batch, columns = decode_tokens(decoder, batch, num_steps, schedule.counts)
        for i, new_tokens in zip(batch.prompts, columns, strict=True):
            if i in tokens:
                tokens[i] += new_tokens
    for i in running:
        schedule.counts[i] += num_steps
    return batch


def _take_ended(
    tokens: dict[int, list[int]],
    limits: list[int],
    tokenizer: PreTrainedTokenizerBase,
    end_tokens: list[int],
    stops: Sequence[str],
) -> dict[int, Completion]:
    """Return the responses of this rank that have ended, and remove their prompts from `tokens`."""
    ended = {}
    for i, new_tokens in tokens.items():
        limit = limits[i]
        text, is_whole = cut_response(new_tokens[:limit], tokenizer, end_tokens, stops)
        if is_whole or len(new_tokens) >= limit:
            ended[i] = Completion(text, truncated=not is_whole)
    for i in ended:
        del tokens[i]
    return ended


def _choose_interval(ended_steps: list[int]) -> int:
    """Return the steps to the next look at what has ended.

    A look is assumed to cost as much as two steps, because new prompts are read then. A response
    that ends between two looks, s steps apart, wastes s / 2 steps on average. A response of n steps
    so costs 2 n / s + s / 2 extra steps, which is least at s = 2 sqrt(n). n is the mean of
    `ended_steps`.
    """
    if not ended_steps:
        return FIRST_INTERVAL
    return 2 * math.isqrt(sum(ended_steps) // len(ended_steps))


def _record_ended(schedule: _Schedule, ended: dict[int, Completion]) -> None:
    """Remove the prompts that have ended from those that run, and note their steps."""
    for rank, indices in enumerate(schedule.running):
        schedule.running[rank] = [i for i in indices if i not in ended]
    schedule.ended_steps += [schedule.counts[i] for i in ended]


def _gather_responses(responses: dict[int, Completion], world_size: int) -> dict[int, Completion]:
    """Return the responses of all ranks."""
    if world_size == 1:
        return responses
    parts: list[dict[int, Completion]] = [{} for _ in range(world_size)]
    dist.all_gather_object(parts, responses)
    gathered = {}
    for part in parts:
        gathered |= part
    return gathered
