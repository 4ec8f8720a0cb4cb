"""Batched greedy generation with transformers, the prompts shared out over all ranks."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

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
    mine: dict[int, str] = {}
    for batch in progress(range(math.ceil(len(prompts) / (batch_size * world_size)))):
        together = by_length[batch * batch_size * world_size : (batch + 1) * batch_size * world_size]
        # A rank without a prompt of its own repeats the first one: sharded ranks run every module equally often.
        share = together[rank::world_size] or together[:1]
        longest = len(prompts[together[0]])
        ids = torch.tensor([[pad] * (longest - len(prompts[i])) + prompts[i] for i in share], device=device)
        lengths = torch.tensor([[len(prompts[i])] for i in share], device=device)
        mask = (torch.arange(longest, device=device) >= longest - lengths).long()
        new = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=min(max_new_tokens, context - longest),
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
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
