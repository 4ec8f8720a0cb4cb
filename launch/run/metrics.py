"""One training step in numbers, as a line of metrics.jsonl holds it."""

import contextlib
import json
from pathlib import Path
from typing import NotRequired, TypedDict

from launch.runtime.errors import UserError

METRICS = "metrics.jsonl"  # in the run folder


class Metrics(TypedDict):
    """One optimiser step, a line of metrics.jsonl."""

    step: int  # from 1
    loss: float  # mean over the step's answer tokens or, with labels, its rows; nats
    grad_norm: float  # before clipping
    lr: float
    tokens: int  # answer tokens of the step or, with labels, its rows; over all ranks
    all_tokens: int  # prompt and answer tokens of the step, over all ranks
    tokens_per_second: float  # of `tokens`, per device
    all_tokens_per_second: float  # per device
    tflops: float | None  # 1e12 FLOP per second and device, as launch/training/flops.py counts them
    utilisation: float | None  # tflops over the device's peak; None if one of them is unknown
    peak_memory_gib: float  # of rank 0 so far
    data_wait: float  # seconds of the step in which rank 0 waited for a batch
    seconds: float  # spent in training steps so far, over all starts of the run
    seconds_left: float  # at the mean pace of the run's steps
    epoch: NotRequired[float]  # epochs done; only of steps after which development rows are scored
    # Scores of the model after this step, name -> metric -> value: development rows, held_out,
    # other_text, benchmarks. Steps are compared by the first metric.
    dev: NotRequired[dict[str, dict[str, float]]]
    scoring_seconds: NotRequired[float]  # that these scores took; not in `seconds`


def read_metrics(folder: Path) -> list[Metrics]:
    """Read the steps in the metrics.jsonl of a run folder, without a last line that is half written.

    Raises:
        UserError: another line is not JSON; the message has its number.
    """
    path = folder / METRICS
    *lines, last = path.read_text(encoding="utf-8").split("\n")
    steps = []
    for number, line in enumerate(lines, start=1):
        try:
            steps.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"line {number} of {path} is not JSON ({error}); mend or remove it"
            ) from None
    with contextlib.suppress(ValueError):  # a run is writing it, or a kill cut it short
        steps.append(json.loads(last))
    return steps
