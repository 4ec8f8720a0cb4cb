"""The steps of decoding on one rank: read prompts, choose tokens, find where a response ends."""

import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from eval.errors import EvalError
from eval.generation.cache import RunningBatch, can_join_rows, make_cache

Forward = Callable[[Tensor, Tensor, Cache | None], tuple[Tensor, Cache]]
"""Runs a model: (token ids of the new columns, mask of the cache and of them, cache).

Returns (fp32 logits after each row's last token, grown cache).
"""


class Completion(NamedTuple):
    """A response, as a model or a server gave it."""

    text: str
    truncated: bool = False  # it was cut off: by the limit of new tokens, or the context's end


class Decoder(NamedTuple):
    """A model, and how tokens are chosen."""

    forward: Forward
    joins_rows: bool  # whether rows of different ages can run together
    device: torch.device
    temperature: float  # 0 is greedy
    seeds: Sequence[int]  # of each prompt, if the temperature is not 0


def make_decoder(
    model: nn.Module,
    num_positions: int | None,
    device: torch.device,
    temperature: float,
    seeds: Sequence[int],
) -> Decoder:
    """Return the decoder of a causal LM.

    Args:
        num_positions: of the model's context; None where there is no limit.

    Raises:
        EvalError: the model has no cache of keys and values, such as Mamba.
    """
    forward = _make_forward(model, num_positions)
    joins_rows = can_join_rows(_get_base_model(model).config)
    return Decoder(forward, joins_rows, device, temperature, seeds)


def _get_base_model(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _make_forward(model: nn.Module, num_positions: int | None) -> Forward:
    base = _get_base_model(model)
    parameters = inspect.signature(base.forward).parameters
    last_position = None if num_positions is None else num_positions - 1
    if "past_key_values" not in parameters:
        raise EvalError(
            f"{type(base).__name__} keeps no keys and values to continue from; serve it",
            subject="model",
        )

    def run_model(ids: Tensor, mask: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        # Only rows that have ended run past the end of the context, until the next look at them.
        positions = (mask.cumsum(1) - 1).clamp(0, last_position)[:, -ids.shape[1] :]
        # Some models compute positions themselves, or have no option for fewer logits.
        options = {"position_ids": positions, "logits_to_keep": 1}
        options = {name: value for name, value in options.items() if name in parameters}
        out = model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options
        )
        return out.logits[:, -1].float(), out.past_key_values

    return run_model


def read_prompts(
    decoder: Decoder, indices: list[int], prompts: Sequence[list[int]]
) -> RunningBatch:
    """Run the model on the prompts at `indices`, and choose the first token of each."""
    longest = max(len(prompts[i]) for i in indices)
    padding = [longest - len(prompts[i]) for i in indices]
    # Any token serves as padding, because the mask hides it.
    padded = [[0] * width + prompts[i] for i, width in zip(indices, padding, strict=True)]
    ids = torch.tensor(padded, device=decoder.device)
    first_token = torch.tensor(padding, device=decoder.device)[:, None]
    mask = (torch.arange(longest, device=decoder.device) >= first_token).long()
    cache = make_cache() if decoder.joins_rows else None
    logits, cache = decoder.forward(ids, mask, cache)
    last = _choose_tokens(decoder, logits, indices, [0] * len(indices))
    return RunningBatch(indices, cache, mask, last)


def decode_tokens(
    decoder: Decoder, batch: RunningBatch, num_steps: int, counts: Sequence[int]
) -> tuple[RunningBatch, list[list[int]]]:
    """Run `num_steps` forward passes.

    The host waits for the device at the end, and where rows are of several lengths at each pass, when
    transformers looks at the mask.

    Args:
        counts: tokens that each prompt has already.

    Returns:
        The grown batch, and the new tokens of each row.
    """
    prompts, cache, mask, last = batch
    columns = [last.new_empty(len(prompts), 0)]
    for step in range(num_steps):
        mask = pad(mask, (0, 1), value=1)
        logits, cache = decoder.forward(last[:, None], mask, cache)
        last = _choose_tokens(decoder, logits, prompts, [counts[i] + step for i in prompts])
        columns.append(last[:, None])
    tokens = torch.cat(columns, 1).tolist()
    return RunningBatch(prompts, cache, mask, last), tokens


def _choose_tokens(
    decoder: Decoder, logits: Tensor, prompts: list[int], counts: list[int]
) -> Tensor:
    """Return the next token of each row, int64 (rows,).

    Args:
        counts: tokens that each row has already.
    """
    if not decoder.temperature:
        return logits.argmax(-1)
    drawn = []
    for row, index, count in zip(logits, prompts, counts, strict=True):
        drawn.append(_draw_token(row, decoder.temperature, decoder.seeds[index], count))
    return torch.stack(drawn)


def _draw_token(logits: Tensor, temperature: float, seed: int, count: int) -> Tensor:
    """Draw one token from softmax(logits / temperature).

    The largest of logits / temperature plus Gumbel noise is such a draw. The noise depends on the
    seed and the number of tokens before, so it is the same in every batch.
    """
    digest = hashlib.sha256(f"{seed} {count}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
    # On the CPU in fp64, so that the same seed draws the same noise on every device.
    noise = -torch.empty(logits.shape, dtype=torch.float64).exponential_(generator=generator).log()
    return (logits.double() / temperature + noise.to(logits.device)).float().argmax()


def find_end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a sequence, by the tokenizer, the config and generation settings.

    They need not agree: a chat model's tokenizer may name <|im_end|>, and its config <|endoftext|>.
    """
    found = [tokenizer.eos_token_id]
    for settings in (model.generation_config, model.config, model.config.get_text_config()):
        tokens = getattr(settings, "eos_token_id", None)
        found += tokens if isinstance(tokens, list | tuple) else [tokens]
    return list(dict.fromkeys(token for token in found if token is not None))


def cut_response(
    tokens: list[int],
    tokenizer: PreTrainedTokenizerBase,
    end_tokens: list[int],
    stops: Sequence[str],
) -> tuple[str, bool]:
    """Return the text of `tokens` up to the end of the sequence or a stop, and whether it ended."""
    ends = [i for i, token in enumerate(tokens) if token in end_tokens]
    # Without the end token: the tokenizer need not know it as a special one, which it would skip.
    kept = tokens[: ends[0]] if ends else tokens
    # Stops are looked for in text, because one may be split into tokens in several ways.
    text = tokenizer.decode(kept, skip_special_tokens=True)
    cut = cut_at_stops(text, stops)
    return cut, bool(ends) or cut != text


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """Return `text` up to the first of `stops` in it."""
    cuts = [position for stop in stops if (position := text.find(stop)) >= 0]
    return text[: min(cuts)] if cuts else text
