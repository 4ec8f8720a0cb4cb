"""The training loop: whatever the engine and world size, the same steps and the same losses."""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import TypedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from launch import watch
from launch.data import TokenSet, collate, deal
from launch.distributed import all_reduce_sum
from launch.engines.base import Engine, Stepper
from launch.errors import DivergedError
from launch.recipe import Train


class Metrics(TypedDict):
    """One optimiser step, a line of metrics.jsonl."""

    step: int  # from 1
    loss: float  # mean over the step's answer tokens, nats
    grad_norm: float  # before clipping
    lr: float
    tokens: int  # answer tokens of the step, over all ranks
    tokens_per_second: float  # answer tokens, over all ranks
    seconds: float  # spent in training steps so far, over all starts of the run


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warmup from 0, then a cosine to 0, of step 0, 1, ... (transformers' get_cosine_schedule_with_warmup)."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * step / max(1, warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def answer_loss(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the label tokens, fp32, nats; labels of -100 do not count. Both are (rows, tokens).

    No attention mask: rows are padded on the right, so no real token sees padding, and fused causal kernels apply.
    """
    logits = model(input_ids=input_ids, use_cache=False).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def micro_batches(settings: Train) -> tuple[int, int]:
    """Rows of one forward pass of a rank, and how many passes accumulate to one optimiser step."""
    world_size = dist.get_world_size()
    micro_batch = min(settings.micro_batch, math.ceil(settings.global_batch / world_size))
    return micro_batch, math.ceil(settings.global_batch / (micro_batch * world_size))


def make_stepper(engine: Engine, model: nn.Module, settings: Train) -> Stepper:
    """AdamW over the parameters of `model` that require gradients, in the engine's hands. Collective."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    return engine.training(model, optimizer, settings.max_grad_norm, micro_batches(settings)[1])


def train(
    stepper: Stepper,
    tokens: TokenSet,
    steps: Sequence[Sequence[int]],
    settings: Train,
    device: torch.device,
    done: Sequence[Metrics] = (),
) -> Iterator[Metrics]:
    """One optimiser step for each item of `steps` after those already `done`.

    Collective. A step's loss is the mean over all its answer tokens: n of them are counted over all ranks and micro
    batches, each micro batch's summed loss is multiplied by world_size / n, and the engine averages gradients over
    ranks. So neither world size nor micro batch changes the loss curve, beyond rounding.

    When a rank is asked to stop (launch.watch), all ranks end after the same step.

    Raises:
        DivergedError: on every rank, when the loss or the gradient norm is not finite.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    micro_batch, accumulation = micro_batches(settings)
    stepper.model.train()
    before = time.perf_counter()
    seconds = done[-1]["seconds"] if done else 0.0
    lengths = tokens.lengths()
    for step, rows in enumerate(steps[len(done) :], start=len(done)):
        watch.mark(f"training step {step + 1}")
        torch.manual_seed(_dropout_seed(settings.seed, step, rank))
        answer_tokens = tokens.answer_tokens(rows)
        rows = sorted(rows, key=lambda row: -lengths[row])  # rows of like length together: less padding, the same sum
        share = deal(rows, rank, world_size, micro_batch)
        share += [[None] * micro_batch] * (accumulation - len(share))  # a short last step
        summed = 0.0
        for micro_rows in share:
            batch, labels = collate(tokens, micro_rows, device)
            loss = answer_loss(stepper.model, batch["input_ids"], labels)
            stepper.backward(loss * (world_size / answer_tokens))
            summed += loss.detach().double()
        step_lr = learning_rate(step, len(steps), settings.lr, settings.warmup_ratio)
        grad_norm = stepper.step(step_lr)
        total, stopping = all_reduce_sum([float(summed), float(watch.stopping())], device)
        loss_value = total / answer_tokens
        if not (math.isfinite(loss_value) and math.isfinite(grad_norm)):
            raise DivergedError(
                f"step {step + 1}: loss {loss_value}, gradient norm {grad_norm}: not finite; lower train.lr "
                "or check the data"
            )
        now = time.perf_counter()
        seconds += now - before
        yield Metrics(
            step=step + 1,
            loss=loss_value,
            grad_norm=grad_norm,
            lr=step_lr,
            tokens=answer_tokens,
            tokens_per_second=answer_tokens / (now - before),
            seconds=seconds,
        )
        if stopping:
            return
        before = time.perf_counter()  # what the caller does between steps (a checkpoint) is not training


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """Of one step on one rank: a run that goes on from a checkpoint draws what the undisturbed one would have."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:8], "big", signed=True)
