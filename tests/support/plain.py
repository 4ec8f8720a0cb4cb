"""The oracle of training: plain transformers and PyTorch, one process, one row at a time."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizer

from launch.config.schema import Recipe, Train
from launch.data.prompts import format_prompt


def load_base(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a model with plain transformers."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def assert_weights_close(found: nn.Module, wanted: nn.Module) -> None:
    """Check that two models have the same weights, but for rounding in fp32."""
    weights = found.state_dict()
    assert weights.keys() == wanted.state_dict().keys()
    for name, weight in wanted.state_dict().items():
        atol = 1e-5 * weight.abs().max().item()
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=atol, msg=name)


def compute_logits(model: nn.Module, base: Path, rows: list[dict]) -> Tensor:
    """Return the fp64 logits, (1, tokens, vocabulary), at every token of the first row."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = format_prompt(rows[0]["query"]) + rows[0]["response"]
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.double()


def train_plainly(
    model: nn.Module, recipe: Recipe, rows: list[dict]
) -> tuple[list[float], list[float]]:
    """Train the parameters of `model` that require gradients, with the recipe's settings.

    Returns:
        The loss and the gradient norm of every step.
    """
    settings = recipe.train
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(trained.values())
    of_b = [p for name, p in trained.items() if ".lora_B." in name]
    others = [p for name, p in trained.items() if ".lora_B." not in name]
    rates = [settings.lr, settings.lr * settings.lr_ratio]  # of the two groups
    optimizer = torch.optim.AdamW(
        [{"params": others}, {"params": of_b}], weight_decay=settings.weight_decay
    )
    steps = settings.max_steps
    warmup = math.ceil(steps * settings.warmup_ratio)
    losses, norms = [], []
    for step in range(steps):
        loss = _compute_step_loss(model, tokenizer, settings, rows, step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        share = (step - warmup) / (steps - warmup)
        rate = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * share))
        for group, peak in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = peak * rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms


def add_first_gradients(model: nn.Module, recipe: Recipe, rows: list[dict]) -> None:
    """Add to the parameters of `model` the gradients of the first step's loss."""
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name)
    _compute_step_loss(model, tokenizer, recipe.train, rows, 0).backward()


def _compute_step_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizer, settings: Train, rows: list[dict], step: int
) -> Tensor:
    """Return the mean cross-entropy of the answer tokens of a step's rows."""
    order: list[int] = []
    generator = torch.Generator().manual_seed(settings.seed)
    while len(order) < (step + 1) * settings.global_batch:
        order += torch.randperm(len(rows), generator=generator).tolist()
    batch = order[step * settings.global_batch : (step + 1) * settings.global_batch]
    sums = [_sum_answer_loss(model, tokenizer, rows[i]) for i in batch]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


@torch.no_grad()
def compute_answer_loss(model: nn.Module, base: Path, rows: list[dict]) -> float:
    """Return the mean cross-entropy of the rows' answer tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    sums = [_sum_answer_loss(model.eval(), tokenizer, row) for row in rows]
    return sum(total.item() for total, _ in sums) / sum(count for _, count in sums)


def _sum_answer_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizer, row: dict
) -> tuple[Tensor, int]:
    """Return the summed cross-entropy of a row's answer tokens, and their number."""
    prompt = format_prompt(row["query"])
    prompt_ids = tokenizer(prompt).input_ids
    ids = tokenizer(prompt + row["response"] + "\n").input_ids
    assert ids[: len(prompt_ids)] == prompt_ids
    ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
    logits = model(input_ids=ids).logits[0]
    start = len(prompt_ids)
    loss = F.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum")
    return loss, ids.shape[1] - start
