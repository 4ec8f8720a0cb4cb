"""The training loop: whatever the engine and world size, the same steps and the same losses."""

import contextlib
import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.config.schema import Train
from launch.data.batches import Packing, TrainBatch, ahead, collate, make_share
from launch.data.tokenize import TokenSet
from launch.engines.base import Engine, Stepper
from launch.runtime import watchdog as watch
from launch.runtime.errors import DivergedError
from launch.training.flops import GIB, Work, peak_memory
from launch.training.loss import AnswerLoss


class Metrics(TypedDict):
    """One optimiser step, a line of metrics.jsonl."""

    step: int  # from 1
    loss: float  # mean over the step's answer tokens, nats
    grad_norm: float  # before clipping
    lr: float
    tokens: int  # answer tokens of the step, over all ranks
    all_tokens: int  # of prompts and answers, over all ranks
    tokens_per_second: float  # answer tokens, per device
    all_tokens_per_second: float  # per device
    tflops: (
        float | None
    )  # 1e12 floating-point operations a second, per device (launch.training.flops.work_of)
    utilisation: float | None  # their share of the device's peak; None if one of them is unknown
    peak_memory_gib: float  # of rank 0 so far
    data_wait: float  # seconds of the step that rank 0 waited for a batch
    seconds: float  # spent in training steps so far, over all starts of the run
    seconds_left: float  # at the mean pace of the run's steps


@dataclass(frozen=True)
class _Launched:
    """A step that the device may still be busy with."""

    step: int
    lr: float
    answer_tokens: int
    lengths: Tensor  # of its rows
    data_wait: float
    numbers: Callable[
        [], list[float]
    ]  # summed loss and requests to stop, over all ranks, and the gradient norm


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warmup from 0, then a cosine to 0, of step 0, 1, ... (transformers' get_cosine_schedule_with_warmup)."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * step / max(1, warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_stepper(engine: Engine, model: nn.Module, settings: Train) -> Stepper:
    """AdamW over the parameters of `model` that require gradients, in the engine's hands. Collective."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    return engine.training(AnswerLoss(model), optimizer, settings.max_grad_norm)


def train(
    stepper: Stepper,
    tokens: TokenSet,
    steps: Sequence[Sequence[int]],
    settings: Train,
    device: torch.device,
    done: Sequence[Metrics] = (),
    packing: Packing | None = None,
    work: Work | None = None,
    peak: float | None = None,
) -> Iterator[Metrics]:
    """One optimiser step for each item of `steps` after those already `done`.

    Collective. A step's loss is the mean over all its answer tokens: n of them are counted over all ranks and micro
    batches, each micro batch's summed loss is multiplied by world_size / n, and the engine averages gradients over
    ranks. So neither world size nor micro batch changes the loss curve, beyond rounding.

    A GPU is never waited for but for the numbers of the step before the one it has just been given: a step's metrics
    come while the next one runs. At a checkpoint's step, and the last one, they come first: what the caller then saves
    is the state after the step whose metrics it has just been given, and those were finite.

    When a rank is asked to stop (launch.runtime.watchdog), all ranks end after the same step.

    Args:
        packing: None: every row is a sequence. work: of the model. peak: FLOP/s of a device.

    Raises:
        DivergedError: on every rank, when the loss or the gradient norm is not finite.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    lengths = tokens.lengths()
    stepper.model.train()
    before = time.perf_counter()
    seconds = done[-1]["seconds"] if done else 0.0
    launched: deque[_Launched] = deque()
    stopping = False

    def finish(this: _Launched) -> Metrics:
        nonlocal before, seconds, stopping
        summed, asked, grad_norm = this.numbers()
        loss = summed / this.answer_tokens
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise DivergedError(
                f"step {this.step + 1}: loss {loss}, gradient norm {grad_norm}: not finite; lower train.lr "
                "or check the data"
            )
        stopping |= asked > 0
        now = time.perf_counter()
        of_devices = (now - before) * world_size
        flops = work.of(this.lengths, this.answer_tokens) / of_devices if work else None
        seconds, before = seconds + now - before, now
        return Metrics(
            step=this.step + 1,
            loss=loss,
            grad_norm=grad_norm,
            lr=this.lr,
            tokens=this.answer_tokens,
            all_tokens=int(this.lengths.sum()),
            tokens_per_second=this.answer_tokens / of_devices,
            all_tokens_per_second=int(this.lengths.sum()) / of_devices,
            tflops=flops / 1e12 if flops else None,
            utilisation=flops / peak if flops and peak else None,
            peak_memory_gib=peak_memory(device) / GIB,
            data_wait=this.data_wait,
            seconds=seconds,
            seconds_left=seconds / (this.step + 1) * (len(steps) - this.step - 1),
        )

    batches = ahead(
        _batches(tokens, lengths, steps[len(done) :], settings.micro_batch, packing, device), device
    )
    with contextlib.closing(batches):
        for step, rows in enumerate(steps[len(done) :], start=len(done)):
            watch.mark(f"training step {step + 1}")
            torch.manual_seed(_dropout_seed(settings.seed, step, rank))
            answer_tokens = tokens.answer_tokens(rows)
            numbers = torch.zeros(2, dtype=torch.float64, device=device)
            waited, last = 0.0, False
            while not last:
                asked = time.perf_counter()
                batch, last = next(batches)
                waited += time.perf_counter() - asked
                batch = batch.to(device)
                loss = stepper.model(
                    batch.input_ids, batch.positions, batch.targets, batch.position_ids
                )
                stepper.backward(loss * (world_size / answer_tokens), last)
                numbers[0] += loss.detach()
            lr = learning_rate(step, len(steps), settings.lr, settings.warmup_ratio)
            grad_norm = stepper.step(lr)
            numbers[1].fill_(float(watch.stopping()))
            dist.all_reduce(numbers)
            numbers = _to_host(torch.cat([numbers, grad_norm.to(numbers).reshape(1)]))
            launched.append(
                _Launched(step, lr, answer_tokens, lengths[torch.as_tensor(rows)], waited, numbers)
            )
            at_once = (
                device.type != "cuda"
                or (step + 1) % settings.checkpoint_every == 0
                or step + 1 == len(steps)
            )
            while len(launched) > (0 if at_once or stopping else 1):
                yield finish(launched.popleft())
            if stopping:
                return
            if not launched:
                before = (
                    time.perf_counter()
                )  # what the caller does between steps (a checkpoint) is not training


def _batches(
    tokens: TokenSet,
    lengths: Tensor,
    steps: Sequence[Sequence[int]],
    micro_batch: int,
    packing: Packing | None,
    device: torch.device,
) -> Iterator[tuple[TrainBatch, bool]]:
    """This rank's batches of `steps`, on the CPU, and whether each is its step's last one."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for rows in steps:
        share = make_share(rows, lengths, rank, world_size, micro_batch, packing)
        for number, sequences in enumerate(share, start=1):
            batch = collate(tokens, sequences, packing)
            yield batch.pinned() if device.type == "cuda" else batch, number == len(share)


def _to_host(values: Tensor) -> Callable[[], list[float]]:
    """`values` on their way to the host while the device goes on; calling it waits for them alone."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return wait


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """Of one step on one rank: a run that goes on from a checkpoint draws what the undisturbed one would have."""
    return int.from_bytes(
        hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:8], "big", signed=True
    )
