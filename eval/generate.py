"""Batched generation with transformers, the prompts shared out over all ranks."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase

FIRST_ROUND = 64  # new tokens; each further round doubles it


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

    Collective. Prompts run in rounds, 64 new tokens in the first and twice as many in each further one; what has ended
    leaves, and the others, with what they have so far, fill batches of like length again. So a long response keeps no
    short one's place, for a pass over its tokens so far in each round.

    Args:
        model: a causal LM with `generate`, in eval mode.
        prompts: token ids; the response to one that fills the model's context is empty (see `too_long`).
        max_new_tokens: per prompt; fewer where the model's context ends before.
        batch_size: prompts that run together on a rank.
        sharded: ranks hold shards of the model, so all of them must run as many forward passes.
        stops: texts that end a response; they and what follows are cut off.
        temperature: 0 for greedy; else tokens are drawn with each prompt's own of `seeds`, whatever the batch.

    Yields:
        index of a prompt -> its response, of all that ended in one batch; the same on every rank.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    context = _context(model)
    if full := too_long(model, prompts):
        yield dict.fromkeys(full, "")
    new: dict[int, list[int]] = {i: [] for i in range(len(prompts)) if i not in set(full)}
    limit, ends = FIRST_ROUND, _ends(model, tokenizer)
    while new:
        by_length = sorted(new, key=lambda i: (-len(prompts[i]) - len(new[i]), i))
        for start in range(0, len(by_length), batch_size * world_size):
            together = by_length[start : start + batch_size * world_size]
            # A rank without a prompt of its own repeats the first one: sharded ranks run every module equally often.
            share = together[rank::world_size] or together[:1]
            found = _continue(
                model,
                [prompts[i] + new[i] for i in share],
                [limit if len(new[i]) + limit <= max_new_tokens else max_new_tokens - len(new[i]) for i in share],
                context,
                ends,
                device,
                sharded and world_size > 1,
                [_Draw(temperature, seeds[i], len(new[i])) for i in share] if temperature else [],
            )
            finished = {}
            for i, tokens in _gather(dict(zip(share, found, strict=True)), world_size).items():
                new[i] += tokens
                response, ended = _response(new[i], tokenizer, ends, stops)
                if ended or len(new[i]) >= max_new_tokens or len(prompts[i]) + len(new[i]) >= context:
                    finished[i] = response
                    del new[i]
            if finished:
                yield finished
        limit *= 2


def too_long(model: nn.Module, prompts: Sequence[list[int]]) -> list[int]:
    """Indices of prompts that leave no room for a new token in the model's context."""
    return [i for i, prompt in enumerate(prompts) if len(prompt) >= _context(model)]


def _context(model: nn.Module) -> int:
    return getattr(model.config, "max_position_embeddings", None) or 2**31


def _continue(
    model: nn.Module,
    prompts: list[list[int]],
    limits: list[int],
    context: int,
    ends: list[int],
    device: torch.device,
    synced: bool,
    draws: list["_Draw"],
) -> list[list[int]]:
    """New tokens of each prompt, at most its limit, the end-of-sequence token included."""
    longest = max(map(len, prompts))
    pad = ends[0] if ends else 0
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
    mask = (torch.arange(longest, device=device) >= longest - lengths).long()
    with _settings(model, GenerationConfig(pad_token_id=pad, eos_token_id=ends or None)):
        rows = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=min(max(limits), context - longest),
            synced_gpus=synced,
            logits_processor=[_Drawing(draws, longest)] if draws else [],
        )[:, longest:].tolist()
    found = []
    for row, limit in zip(rows, limits, strict=True):
        end = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
        found.append(row[: min(end, limit)])
    return found


def _gather(mine: dict[int, list[int]], world_size: int) -> dict[int, list[int]]:
    """Every rank's rows; of one that several ranks ran, the first rank's."""
    parts: list[dict[int, list[int]]] = [mine]
    if world_size > 1:
        parts = [{} for _ in range(world_size)]
        dist.all_gather_object(parts, mine)
    return {index: row for part in reversed(parts) for index, row in part.items()}


def _response(
    tokens: list[int], tokenizer: PreTrainedTokenizerBase, ends: list[int], stops: Sequence[str]
) -> tuple[str, bool]:
    """The text of new tokens up to a stop, and whether it has ended."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    cuts = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(cuts)], True) if cuts else (text, bool(tokens) and tokens[-1] in ends)


def _ends(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a sequence: the tokenizer's, then those of the model's own generation settings."""
    own = model.generation_config.eos_token_id
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token for token in found if token is not None))


class _Draw:
    """Gumbel noise for one prompt: the largest of logits / temperature + noise is a draw from their softmax."""

    def __init__(self, temperature: float, seed: int, done: int) -> None:
        self.temperature, self.seed, self.done = temperature, seed, done

    def scores(self, logits: Tensor, step: int) -> Tensor:
        digest = hashlib.sha256(f"{self.seed} {self.done + step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
        noise = -torch.empty(logits.shape, dtype=torch.float64).exponential_(generator=generator).log()
        return (logits.double() / self.temperature + noise.to(logits.device)).float()


class _Drawing(LogitsProcessor):
    """Draws for every row of a batch, so that greedy choice samples."""

    def __init__(self, draws: list[_Draw], prompt_length: int) -> None:
        self.draws, self.prompt_length = draws, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        return torch.stack([draw.scores(row, step) for draw, row in zip(self.draws, scores, strict=True)])


@contextmanager
def _settings(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Within it `config` alone decides: a checkpoint's own settings (repetition_penalty, ...) would fill its gaps."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
