"""What a run measures besides benchmarks: loss on rows it never trains on, forgetting, memory, trained parameters."""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase

from launch.data.tokenize import TokenSet, collate, deal, encode
from launch.engines.base import Engine
from launch.runtime.distributed import all_reduce_sum
from launch.runtime.errors import UserError
from launch.training import flops as throughput

BATCH = 8  # rows of one pass; fixed, so that no setting and no world size changes what is summed together


def split(tokens: TokenSet, held_out: int) -> tuple[TokenSet, TokenSet | None]:
    """The rows to train and calibrate on, and the last `held_out` rows; None for 0.

    Raises UserError if no row would be left to train on.
    """
    if held_out == 0:
        return tokens, None
    left = len(tokens) - held_out
    if left < 1:
        raise UserError(
            f"data.held_out: {held_out} of {len(tokens)} rows leave none to train on; lower it"
        )
    edge = tokens.offsets[left]
    parts = {
        "tokens": (tokens.tokens[:edge], tokens.tokens[edge:]),
        "offsets": (tokens.offsets[: left + 1], tokens.offsets[left:] - edge),
        "answer_starts": (tokens.answer_starts[:left], tokens.answer_starts[left:]),
    }
    first, second = ({name: of[side] for name, of in parts.items()} for side in (0, 1))
    return dataclasses.replace(tokens, **first), dataclasses.replace(
        tokens, **second, num_cut=0, num_left_out=0
    )


def read_text(
    path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[TokenSet, dict]:
    """Text outside the task: `text` of every row of a JSONL file, or the whole of a .txt file; and what it is.

    A text is taken in pieces of at most `max_length` tokens, in each of which every token but the first counts. Raises
    UserError for a file that cannot be read, or a row without text.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"eval.other_text: cannot read {path}: {error}") from None
    texts = [content]
    if path.suffix == ".jsonl":
        texts = []
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                texts.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"eval.other_text: row {number} of {path} has no field 'text'; mend it"
                ) from None
    elif path.suffix != ".txt":
        raise UserError(f"eval.other_text: {path} is neither .jsonl nor .txt")
    rows = [
        ids[i : i + max_length]
        for ids in encode(tokenizer, texts)
        for i in range(0, len(ids), max_length)
    ]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise UserError(f"eval.other_text: {path} has no text")
    tokens = torch.tensor([i for row in rows for i in row], dtype=torch.int32)
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    return TokenSet(tokens, offsets, torch.ones(len(rows), dtype=torch.int64), 0, 0), {
        "path": str(path),
        "sha256": sha256,
    }


@torch.no_grad()
def prediction(engine: Engine, model: nn.Module, tokens: TokenSet) -> dict[str, float]:
    """How well `model` predicts the answer tokens of `tokens`. Collective; it must be able to run forward passes.

    Returns:
        loss: mean over the tokens, nats, summed in fp64 over the ranks; accuracy: share of them that the largest logit
        names; tokens: how many.
    """
    loss = right = count = 0.0
    for rows in deal(
        range(len(tokens)), dist.get_rank(), dist.get_world_size(), BATCH
    ):  # as many passes on each rank
        batch, labels = collate(tokens, rows, engine.device)
        logits = (
            model(input_ids=batch["input_ids"], use_cache=False)
            .logits[:, :-1]
            .flatten(0, 1)
            .float()
        )
        wanted = labels[:, 1:].flatten()
        loss += (
            F.cross_entropy(logits, wanted, ignore_index=-100, reduction="none")
            .double()
            .sum()
            .item()
        )
        right += (logits.argmax(-1) == wanted).sum().item()
        count += (wanted != -100).sum().item()
    loss, right, count = all_reduce_sum([loss, right, count], engine.device)
    return {"loss": loss / count, "accuracy": right / count, "tokens": int(count)}


def predictions(
    engine: Engine, model: nn.Module, sets: dict[str, TokenSet]
) -> dict[str, dict[str, float]]:
    """`prediction` of each of `sets`, by name. Collective."""
    model.eval()
    return {name: prediction(engine, model, tokens) for name, tokens in sets.items()}


def peak_memory(device: torch.device) -> list[int]:
    """The most bytes that each rank has held, see throughput.peak_memory. Collective."""
    found = [0] * dist.get_world_size()
    dist.all_gather_object(found, throughput.peak_memory(device))
    return found


def trained_parameters(model: nn.Module) -> int:
    """Numbers that training changes, whole also where they are sharded (ZeRO-3 keeps the size in `ds_numel`)."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
