"""The oracle of training: plain transformers and PyTorch, one process, one row at a time, settings by hand."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from launch.config.schema import Recipe
from launch.data import tokenize as launch_data


def load_base(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def logits(model: nn.Module, base: Path, rows: list[dict]) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor(
        [tokenizer(launch_data.prompt(rows[0]["query"]) + rows[0]["response"]).input_ids]
    )
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.double()


def plain_training(
    model: nn.Module, recipe: Recipe, rows: list[dict]
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of training what requires gradients in `model`, by the recipe's settings."""
    settings, tokenizer = recipe.train, AutoTokenizer.from_pretrained(recipe.model.name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    steps = settings.max_steps
    warmup = math.ceil(steps * settings.warmup_ratio)
    order = []
    generator = torch.Generator().manual_seed(settings.seed)
    while len(order) < steps * settings.global_batch:
        order += torch.randperm(len(rows), generator=generator).tolist()
    losses, norms = [], []
    for step in range(steps):
        batch = order[step * settings.global_batch : (step + 1) * settings.global_batch]
        total, count = torch.zeros(()), 0
        for i in batch:
            begin = tokenizer(launch_data.prompt(rows[i]["query"])).input_ids
            ids = tokenizer(
                launch_data.prompt(rows[i]["query"]) + rows[i]["response"] + "\n"
            ).input_ids
            assert ids[: len(begin)] == begin
            ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
            output = model(input_ids=ids).logits[0]
            total = total + F.cross_entropy(
                output[len(begin) - 1 : -1], ids[0, len(begin) :], reduction="sum"
            )
            count += ids.shape[1] - len(begin)
        loss = total / count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        share = (step - warmup) / (steps - warmup)
        rate = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms
