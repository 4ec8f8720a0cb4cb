"""Generation with transformers: places in the batch fill again as responses end, and all ranks share the prompts."""

import hashlib
import inspect
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from eval.errors import EvalError

ROOM = 32  # free columns that a cache grows by

Forward = Callable[[Tensor, Tensor, Cache | None], tuple[Tensor, Cache]]
"""(token ids, mask of the cache and them, cache) -> (fp32 logits after each row's last token, grown cache)."""
Choose = Callable[[Tensor, list[int], int], Tensor]
"""(logits of each row, prompts of the rows, steps since the last look) -> each row's next token."""


class _Running(NamedTuple):
    """The rows that a rank decodes together, aligned at the right."""

    rows: list[int]  # the prompt of each
    cache: Cache  # of all tokens but the last
    mask: Tensor  # (rows, width of the cache): 1 for a token, 0 for the padding at the left
    last: Tensor  # (rows,): the newest token of each


class _Roomy(DynamicLayer):
    """Keys and values with free columns at the right, so that a step writes its own and copies none of the others."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if self.room[0].shape[-2] < end:
            self.room = tuple(
                pad(part, (0, 0, 0, end - start + ROOM)) for part in (self.keys, self.values)
            )
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[..., start:end, :] = new
        self.keys, self.values = (room[..., :end, :] for room in self.room)
        return self.keys, self.values

    def keep(self, rows: Tensor, width: int) -> None:
        """Only some rows, and of these only the last `width` columns."""
        self.room = self.keys, self.values = (
            self.keys[rows, :, -width:],
            self.values[rows, :, -width:],
        )


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    device: torch.device,
    sharded: bool,
    stops: Sequence[str] = (),
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
) -> Iterator[dict[int, str]]:
    """The continuation of each prompt up to end-of-sequence or a stop, as text, in the order in which they end.

    Collective. Every few tokens what has ended leaves, and prompts that wait, the longest first, take the places; so no
    short response waits for a long one, and no rank for another. (transformers' own continuous batching cannot take the
    same steps on every rank, as shards must.) A model that keeps more than keys and values of each token, such as the
    states of convolutions, runs batch after batch.

    Args:
        model: a causal LM, in eval mode; its own generation settings (repetition_penalty, ...) do not count.
        prompts: token ids; the response to one that fills the model's context is empty (see `too_long`).
        max_new_tokens: per prompt; fewer where the model's context ends before.
        batch_size: prompts that run together on a rank.
        sharded: ranks hold shards of the model, so all of them must run as many forward passes.
        stops: texts that end a response; they and what follows are cut off.
        temperature: 0 for greedy; else tokens are drawn with each prompt's own of `seeds`, whatever the batch.

    Yields:
        index of a prompt -> its response, of all that ended since the last; the same on every rank.

    Raises EvalError for a model without keys and values, such as Mamba.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if full := too_long(model, prompts):
        yield dict.fromkeys(full, "")
    limits = [min(max_new_tokens, _context(model) - len(prompt)) for prompt in prompts]
    waiting = deque(
        sorted(
            (i for i in range(len(prompts)) if limits[i] > 0), key=lambda i: (-len(prompts[i]), i)
        )
    )
    # Every rank knows what each of them runs and how far it is, so all take the same steps without asking.
    running: list[list[int]] = [[] for _ in range(world_size)]
    made = [0] * len(prompts)
    lengths: list[int] = []  # of the responses that have ended
    mine: dict[int, list[int]] = {}  # new tokens of the prompts that this rank runs
    state: _Running | None = None
    forward, refills, ends = _forward(model), _refills(model), _ends(model, tokenizer)

    def choose(logits: Tensor, rows: list[int], step: int) -> Tensor:
        if not temperature:
            return logits.argmax(-1)
        drawn = [
            _draw(of, temperature, seeds[i], made[i] + step)
            for of, i in zip(logits, rows, strict=True)
        ]
        return torch.stack(drawn)

    while waiting or any(running):
        new = (
            _admit(waiting, running, batch_size)
            if refills or not any(running)
            else [[] for _ in running]
        )
        if state:
            # A sharded rank without a prompt of its own steps along with one that has ended, or that another runs.
            keep = [at for at, i in enumerate(state.rows) if i in mine] or [0] * sharded
            state = _select(state, keep, refills) if keep else None
        mine |= {i: [] for i in new[rank]}
        if admitted := new[rank] or [i for part in new for i in part][:1] * sharded:
            fresh = _prefill(
                forward, admitted, prompts, _cache() if refills else None, choose, device
            )
            for i, token in zip(fresh.rows, fresh.last.tolist(), strict=True):
                if i in new[rank]:
                    mine[i].append(token)
            if not state or not refills:
                state = fresh
            elif new[rank]:
                state = _join(state, fresh)
        for i in (i for part in new for i in part):
            made[i] = 1
        steps = min(_interval(lengths), max(limits[i] - made[i] for part in running for i in part))
        if state:
            state, found = _decode(forward, state, steps, choose)
            for i, tokens in zip(state.rows, found, strict=True):
                if i in mine:
                    mine[i] += tokens
        for i in (i for part in running for i in part):
            made[i] += steps
        ended = {}
        for i, tokens in mine.items():
            response, whole = _response(tokens[: limits[i]], tokenizer, ends, stops)
            if whole or len(tokens) >= limits[i]:
                ended[i] = response
        mine = {i: tokens for i, tokens in mine.items() if i not in ended}
        if ended := _gather(ended, world_size):
            running = [[i for i in part if i not in ended] for part in running]
            lengths += [made[i] for i in ended]
            yield ended


def too_long(model: nn.Module, prompts: Sequence[list[int]]) -> list[int]:
    """Indices of prompts that leave no room for a new token in the model's context."""
    return [i for i, prompt in enumerate(prompts) if len(prompt) >= _context(model)]


def _context(model: nn.Module) -> int:
    return getattr(model.config, "max_position_embeddings", None) or 2**31


def _interval(lengths: list[int]) -> int:
    """Steps to the next look at what has ended, by the number of tokens of the responses that have.

    A look every s steps costs about two steps, for new prompts are read, and s / 2 steps of a response that has ended
    meanwhile: of n tokens 2 / s + s / 2n, which is least at 2 sqrt(n).
    """
    return 2 * math.isqrt(sum(lengths) // len(lengths)) if lengths else 8


def _admit(waiting: deque[int], running: list[list[int]], batch_size: int) -> list[list[int]]:
    """Move waiting prompts to the ranks that run fewest, up to `batch_size` on each; what each rank got."""
    new: list[list[int]] = [[] for _ in running]
    while waiting:
        rank = min(range(len(running)), key=lambda rank: len(running[rank]))
        if len(running[rank]) >= batch_size:
            break
        new[rank].append(waiting.popleft())
        running[rank].append(new[rank][-1])
    return new


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _cache() -> Cache:
    return Cache(layer_class_to_replicate=_Roomy)


def _refills(model: nn.Module) -> bool:
    """Whether rows of different ages can run together: every layer keeps keys and values of each token alone."""
    layers = DynamicCache(config=_base(model).config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _forward(model: nn.Module) -> Forward:
    takes, end = inspect.signature(_base(model).forward).parameters, _context(model) - 1
    if "past_key_values" not in takes:
        kind = type(_base(model)).__name__
        raise EvalError(
            f"--model: {kind} keeps no keys and values to go on from; serve it, and use --backend openai"
        )

    def forward(ids: Tensor, mask: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        # Past the context's end run only rows that have ended, until the next look.
        positions = (mask.cumsum(1) - 1).clamp(0, end)[:, -ids.shape[1] :]
        options = {"position_ids": positions, "logits_to_keep": 1}
        options = {name: value for name, value in options.items() if name in takes}
        out = model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options
        )
        return out.logits[:, -1].float(), out.past_key_values

    return forward


def _prefill(
    forward: Forward,
    rows: list[int],
    prompts: Sequence[list[int]],
    cache: Cache | None,
    choose: Choose,
    device: torch.device,
) -> _Running:
    """Read prompts, and choose the first token of each."""
    longest = max(len(prompts[i]) for i in rows)
    padding = [longest - len(prompts[i]) for i in rows]
    ids = torch.tensor(
        [[0] * by + prompts[i] for i, by in zip(rows, padding, strict=True)], device=device
    )
    mask = (
        torch.arange(longest, device=device) >= torch.tensor(padding, device=device)[:, None]
    ).long()
    logits, cache = forward(ids, mask, cache)
    return _Running(rows, cache, mask, choose(logits, rows, 0))


def _decode(
    forward: Forward, state: _Running, steps: int, choose: Choose
) -> tuple[_Running, list[list[int]]]:
    """Run `steps` forward passes; the tokens that each row got. The device is waited for once, at the end."""
    rows, cache, mask, last = state
    found = [last.new_empty(len(rows), 0)]
    for step in range(steps):
        mask = pad(mask, (0, 1), value=1)
        logits, cache = forward(last[:, None], mask, cache)
        last = choose(logits, rows, step)
        found.append(last[:, None])
    return _Running(rows, cache, mask, last), torch.cat(found, 1).tolist()


def _select(state: _Running, keep: list[int], trim: bool) -> _Running:
    """The rows at `keep`; with `trim` without the columns in which none of them has a token."""
    at = torch.tensor(keep, device=state.mask.device)
    mask = state.mask[at]
    if trim:
        width = int(mask.sum(1).max())
        mask = mask[:, -width:]
        for layer in state.cache.layers:
            layer.keep(at, width)
    else:
        state.cache.reorder_cache(at)
    return _Running([state.rows[row] for row in keep], state.cache, mask, state.last[at])


def _join(a: _Running, b: _Running) -> _Running:
    width = max(a.mask.shape[1], b.mask.shape[1])

    def together(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([pad(part, (0, 0, width - part.shape[-2], 0)) for part in (x, y)])

    cache = _cache()
    for number, (x, y) in enumerate(zip(a.cache.layers, b.cache.layers, strict=True)):
        cache.update(together(x.keys, y.keys), together(x.values, y.values), number)
    mask = torch.cat([pad(part, (width - part.shape[1], 0)) for part in (a.mask, b.mask)])
    return _Running(a.rows + b.rows, cache, mask, torch.cat([a.last, b.last]))


def _gather(mine: dict[int, str], world_size: int) -> dict[int, str]:
    """Every rank's responses."""
    parts: list[dict[int, str]] = [mine]
    if world_size > 1:
        parts = [{} for _ in range(world_size)]
        dist.all_gather_object(parts, mine)
    return {i: response for part in parts for i, response in part.items()}


def _response(
    tokens: list[int], tokenizer: PreTrainedTokenizerBase, ends: list[int], stops: Sequence[str]
) -> tuple[str, bool]:
    """The text of new tokens up to the end of the sequence or a stop, and whether it has ended."""
    end = next((at + 1 for at, token in enumerate(tokens) if token in ends), None)
    text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    cuts = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(cuts)], True) if cuts else (text, end is not None)


def _ends(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a sequence: the tokenizer's, then those of the model's own generation settings."""
    own = model.generation_config.eos_token_id
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token for token in found if token is not None))


def _draw(logits: Tensor, temperature: float, seed: int, step: int) -> Tensor:
    """One token: the largest of logits / temperature + Gumbel noise is a draw from their softmax."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
    noise = -torch.empty(logits.shape, dtype=torch.float64).exponential_(generator=generator).log()
    return (logits.double() / temperature + noise.to(logits.device)).float().argmax()
