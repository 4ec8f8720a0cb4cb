"""Batched greedy generation with transformers, the prompts shared out over all ranks."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from eval.errors import EvalError


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    device: torch.device,
    sharded: bool,
    progress: Callable[[range], Iterable[int]] = iter,
) -> list[str]:
    """The greedy continuation of each prompt up to end-of-sequence, as text; all of them on every rank. Collective.

    Args:
        model: a causal LM with `generate`, in eval mode.
        prompts: token ids. Prompts of like length run together; a prompt leaves room for at least one new token.
        max_new_tokens: per prompt; fewer where the model's context ends before.
        sharded: ranks hold shards of the model, so all of them must run as many forward passes.
        progress: wraps the batch numbers, for a progress bar.

    Raises:
        EvalError: a prompt that fills the model's context.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    context = getattr(model.config, "max_position_embeddings", None) or 2**31
    by_length = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    if by_length and len(prompts[by_length[0]]) >= context:
        raise EvalError(f"a prompt of {len(prompts[by_length[0]])} tokens fills the model's context of {context}")
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    # Prompts near the context's end run alone on their rank: each has its own number of tokens left.
    tight = sum(len(prompt) + max_new_tokens > context for prompt in prompts)
    batches = _chunks(by_length[:tight], world_size) + _chunks(by_length[tight:], batch_size * world_size)
    mine: dict[int, str] = {}
    for batch in progress(range(len(batches))):
        together = batches[batch]
        # A rank without a prompt of its own repeats the first one: sharded ranks run every module equally often.
        share = together[rank::world_size] or together[:1]
        longest = max(len(prompts[i]) for i in share)
        ids = torch.tensor([[pad] * (longest - len(prompts[i])) + prompts[i] for i in share], device=device)
        lengths = torch.tensor([[len(prompts[i])] for i in share], device=device)
        mask = (torch.arange(longest, device=device) >= longest - lengths).long()
        with _settings(model, GenerationConfig(pad_token_id=pad, eos_token_id=tokenizer.eos_token_id)):
            new = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=min(max_new_tokens, context - longest),
                synced_gpus=sharded and world_size > 1,
            )[:, longest:]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        mine |= dict(zip(share, texts, strict=True))
    parts: list[dict[int, str]] = [mine]
    if dist.is_initialized():
        parts = [{} for _ in range(world_size)]
        dist.all_gather_object(parts, mine)
    texts_of = {index: text for part in reversed(parts) for index, text in part.items()}
    return [texts_of[index] for index in range(len(prompts))]


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


@contextmanager
def _settings(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Within it `config` alone decides: a checkpoint's own settings (repetition_penalty, ...) would fill its gaps."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
