"""The training loop.

Without dropout, engine, world size and micro batch change the losses by rounding only; where a base
lets them change more, `refuse_mixed_lengths` of launch/training/kernels.py refuses the run.
"""

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.config.schema import Train
from launch.data.batches import RowBatch, TrainBatch, collate_rows, collate_sequences, prefetch
from launch.data.order import Packing, plan_micro_batches
from launch.data.token_set import TokenSet
from launch.engines.base import Engine, TrainState
from launch.run.metrics import Metrics
from launch.runtime import watchdog
from launch.runtime.errors import DivergedError
from launch.runtime.memory import read_peak_memory
from launch.runtime.units import GIB
from launch.training.flops import FlopCounts
from launch.training.loss import AnswerLoss
from launch.training.trainable import group_parameters


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the device may still be busy with."""

    index: int  # from 0
    lr: float
    num_answer_tokens: int  # over all ranks
    lengths: Tensor  # (examples,), tokens of each example of the step, over all ranks
    data_wait: float  # seconds that this rank waited for batches
    # Waits for the device. Returns the loss summed over the answer tokens of all ranks, the number
    # of ranks that were asked to stop, and the gradient norm before clipping.
    read_numbers: Callable[[], list[float]]


class StepRecorder:
    """Computes the metrics of launched steps, and measures training time over all launches."""

    def __init__(
        self,
        num_steps: int,
        history: Sequence[Metrics],
        device: torch.device,
        flop_counts: FlopCounts | None,
        peak_flops: float | None,
    ) -> None:
        self.num_steps = num_steps
        self.device = device
        self.flop_counts = flop_counts
        self.peak_flops = peak_flops
        # Seconds of training over all launches of the run, up to `began`.
        self.seconds = history[-1]["seconds"] if history else 0.0
        self.began = time.perf_counter()
        self.stopping = False  # whether a rank was asked to stop

    def restart_clock(self) -> None:
        """Start timing anew, so that what the caller did since the last step does not count.

        Such as saving a checkpoint.
        """
        self.began = time.perf_counter()

    def finish_step(self, launched: LaunchedStep) -> Metrics:
        """Wait for a step's numbers and return its metrics. Raises DivergedError."""
        summed_loss, num_asked_to_stop, grad_norm = launched.read_numbers()
        loss = summed_loss / launched.num_answer_tokens
        step = launched.index + 1
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise DivergedError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite; lower train.lr "
                "or check the data"
            )
        self.stopping |= num_asked_to_stop > 0
        now = time.perf_counter()
        # Summed over devices, since the rates below are per device.
        device_seconds = (now - self.began) * dist.get_world_size()
        self.seconds += now - self.began
        self.began = now
        num_tokens = int(launched.lengths.sum())
        flops = None  # per second and device
        if self.flop_counts is not None:
            counted = self.flop_counts.count_step(launched.lengths, launched.num_answer_tokens)
            flops = counted / device_seconds
        return Metrics(
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            lr=launched.lr,
            tokens=launched.num_answer_tokens,
            all_tokens=num_tokens,
            tokens_per_second=launched.num_answer_tokens / device_seconds,
            all_tokens_per_second=num_tokens / device_seconds,
            tflops=flops / 1e12 if flops else None,
            utilisation=flops / self.peak_flops if flops and self.peak_flops else None,
            peak_memory_gib=read_peak_memory(self.device) / GIB,
            data_wait=launched.data_wait,
            seconds=self.seconds,
            seconds_left=self.seconds / step * (self.num_steps - step),
        )


def compute_learning_rate(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """Return the learning rate of `step`, counted from 0.

    Linear warmup from 0 to `peak`, then half a cosine towards 0: transformers'
    get_cosine_schedule_with_warmup, with its first step at rate 0.
    """
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * step / max(1, warmup)
    angle = math.pi * (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(angle))


def describe_low_rates(steps: int, settings: Train) -> str | None:
    """Return a line if no step of a run reaches the peak learning rate; None if one does."""
    warmup = math.ceil(steps * settings.warmup_ratio)
    if warmup < steps:
        return None
    highest = settings.lr * (steps - 1) / warmup
    if highest == 0:  # a single step, which warms up
        return (
            "warning: the only step has learning rate 0, for warmup begins at 0: nothing is "
            "trained; raise train.max_steps (or the rows), or set train.warmup_ratio=0"
        )
    return (
        f"warning: all {steps} steps are warmup, so the learning rate reaches {highest:.2e} and "
        f"not train.lr, {settings.lr:.2e}; raise train.max_steps (or the rows), or lower "
        "train.warmup_ratio"
    )


def describe_unused_epochs(num_examples: int, settings: Train) -> str | None:
    """Return a line if train.epochs is set and train.max_steps overrides it; None if not."""
    if settings.max_steps is None or settings.is_default("epochs"):
        return None
    epochs = settings.max_steps * settings.global_batch / num_examples
    return (
        f"train.max_steps={settings.max_steps} ends the run after {epochs:.3g} epochs; train.epochs "
        "is not used"
    )


def make_train_state(
    engine: Engine,
    model: nn.Module,
    settings: Train,
    loss: nn.Module | None = None,
    head: Collection[str] = (),
) -> TrainState:
    """Make AdamW over all trained parameters of `model`, in groups of one learning rate. Collective.

    Args:
        loss: wraps `model` and computes its loss, AnswerLoss when None.
        head: names of a new head's parameters, which have train.head_lr.

    Returns:
        The engine's state, whose `model` is the loss.
    """
    groups = []
    for group in group_parameters(model, settings, head):
        groups.append({"params": group.parameters, "lr_factor": group.lr_factor})
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.lr,  # TrainState.step sets each group's
        weight_decay=settings.weight_decay,
        fused=engine.device.type == "cuda",  # one kernel for all parameters
    )
    return engine.make_trainable(loss or AnswerLoss(model), optimizer, settings.max_grad_norm)


def train(
    state: TrainState,
    tokens: TokenSet,
    steps: Sequence[Sequence[int]],
    settings: Train,
    device: torch.device,
    history: Sequence[Metrics] = (),
    packing: Packing | None = None,
    flop_counts: FlopCounts | None = None,
    peak_flops: float | None = None,
    pauses: Collection[int] = (),
) -> Iterator[Metrics]:
    """Run one optimiser step for each item of `steps` after those in `history`. Collective.

    On a GPU the metrics of a step are yielded after the next step has been launched, so that the
    GPU is busy while the CPU reads them. Before a checkpoint, after the first step of this call and
    at the last one, the loop waits and yields at once. What the caller then saves is the state
    after the step just yielded, whose loss and gradient norm were finite.

    When a rank is asked to stop (launch.runtime.watchdog), all ranks end after the same step.

    Args:
        steps: for each step of the run, its examples, over all ranks.
        history: the metrics of the steps of earlier launches.
        packing: None where every example is a sequence of its own.
        flop_counts: counts a step's FLOPs for the metrics; None leaves them out.
        peak_flops: FLOP/s that one device can do at most.
        pauses: other steps, from 1, after which the loop waits, since the caller uses the model.

    Yields:
        The metrics of each step.

    Raises:
        DivergedError: on every rank, when the loss or the gradient norm is not finite.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    lengths = tokens.lengths()
    remaining = steps[len(history) :]
    recorder = StepRecorder(len(steps), history, device, flop_counts, peak_flops)
    unread: list[LaunchedStep] = []  # steps whose numbers have not been read: at most two
    state.model.train()
    micro_batches = _make_batches(tokens, lengths, remaining, settings.micro_batch, packing, device)
    with contextlib.closing(prefetch(micro_batches, device)) as batches:
        for index, examples in enumerate(remaining, start=len(history)):
            watchdog.heartbeat(f"training step {index + 1}")
            torch.manual_seed(_make_dropout_seed(settings.seed, index, rank))

            # Forward and backward. An answer token is one that the loss counts. The step has n of
            # them, spread over ranks and micro batches, and its loss is their mean:
            #     L = 1/n * sum over ranks and micro batches of summed_loss
            # with summed_loss the cross-entropy summed over one micro batch's answer tokens. The
            # engine adds gradients up over micro batches and averages them over ranks, that is, it
            # divides by world_size. With every summed_loss times world_size / n, the result is the
            # gradient of L. So neither world size nor micro batch changes it, beyond rounding.
            num_answer_tokens = tokens.count_answer_tokens(examples)
            step_sums = torch.zeros(2, dtype=torch.float64, device=device)
            data_wait, is_last = 0.0, False
            while not is_last:
                asked = time.perf_counter()
                batch, is_last = next(batches)
                data_wait += time.perf_counter() - asked
                batch = batch.to(device)
                # An AnswerLoss or a RowLoss: it returns the loss, no logits.
                summed_loss = state.model(*batch.arguments())
                state.backward(summed_loss * (world_size / num_answer_tokens), is_last)
                step_sums[0] += summed_loss.detach()

            # Optimiser step.
            lr = compute_learning_rate(index, len(steps), settings.lr, settings.warmup_ratio)
            grad_norm = state.step(lr)

            # Sum over ranks: n * L, and how many ranks were asked to stop. All ranks see the same
            # sums, so all of them end after the same step.
            step_sums[1].fill_(float(watchdog.stop_requested()))
            dist.all_reduce(step_sums)
            numbers = torch.cat([step_sums, grad_norm.to(step_sums).reshape(1)])
            read_numbers = _copy_to_host(numbers)
            step_lengths = lengths[torch.as_tensor(examples)]
            unread.append(
                LaunchedStep(index, lr, num_answer_tokens, step_lengths, data_wait, read_numbers)
            )

            # Log. On a GPU the newest step stays unread while the next one is launched.
            is_checkpoint = (index + 1) % settings.checkpoint_every == 0
            is_first = index == len(history)  # the caller then tries to save
            is_pause = index + 1 == len(steps) or index + 1 in pauses
            wait = device.type != "cuda" or is_checkpoint or is_first or is_pause
            while unread:
                # finish_step may set recorder.stopping; then the newest step is read as well.
                if len(unread) == 1 and not (wait or recorder.stopping):
                    break
                yield recorder.finish_step(unread.pop(0))
            if recorder.stopping:
                return
            if not unread:
                recorder.restart_clock()


def _make_batches(
    tokens: TokenSet,
    lengths: Tensor,
    steps: Sequence[Sequence[int]],
    micro_batch: int,
    packing: Packing | None,
    device: torch.device,
) -> Iterator[tuple[TrainBatch | RowBatch, bool]]:
    """Yield this rank's micro batches of `steps`, on the CPU, and whether each is its step's last."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for examples in steps:
        planned = plan_micro_batches(examples, lengths, rank, world_size, micro_batch, packing)
        for number, sequences in enumerate(planned, start=1):
            if tokens.labels is not None:  # packing is for causal tasks
                batch = collate_rows(tokens, [None if s is None else s[0] for s in sequences])
            else:
                batch = collate_sequences(tokens, sequences, packing)
            if device.type == "cuda":
                batch = batch.pin_memory()
            yield batch, number == len(planned)


def _copy_to_host(values: Tensor) -> Callable[[], list[float]]:
    """Start copying `values` to the host; return a function that waits for them and them alone."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read


def _make_dropout_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of one step on one rank.

    It depends on nothing else, so a resumed run draws what the undisturbed one would have drawn.
    Ranks draw different masks, so with dropout the losses depend on world size and micro batch.
    """
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
