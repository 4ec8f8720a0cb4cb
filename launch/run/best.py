"""What the scores of a run while it trains say: which step was the best, and whether to stop.

All of it follows from the steps done, which checkpoints hold. So a run that resumes decides as the
undisturbed one does, and every rank decides alike.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from launch.run.metrics import Metrics

LOWER_IS_BETTER = ("loss",)  # of all other metrics a higher value is better


class ScoredStep(NamedTuple):
    """What a score was after a step."""

    step: int  # from 1
    metric: str  # the score's first, by which steps are compared
    value: float


def list_scored_steps(history: Sequence[Metrics], name: str) -> list[ScoredStep]:
    """List the steps after which the score `name` (see Metrics.dev) was made."""
    scored = []
    for metrics in history:
        values = metrics.get("dev", {}).get(name)
        if values:
            metric, value = next(iter(values.items()))
            scored.append(ScoredStep(metrics["step"], metric, value))
    return scored


def list_score_names(history: Sequence[Metrics]) -> list[str]:
    """List the names of all scores that were made."""
    return list(dict.fromkeys(name for metrics in history for name in metrics.get("dev", {})))


def find_best(history: Sequence[Metrics], name: str) -> ScoredStep | None:
    """Return the best step by the score `name`, the earliest of equal ones.

    A value that is not finite is never the best. None where there is no other.
    """
    best = None
    for scored in list_scored_steps(history, name):
        if math.isfinite(scored.value) and (best is None or _is_better(scored, best)):
            best = scored
    return best


def stops_early(history: Sequence[Metrics], name: str | None, patience: int | None) -> bool:
    """Return whether the last `patience` scores, train.patience, have brought no better one."""
    if name is None or patience is None:
        return False
    best = find_best(history, name)
    scored = list_scored_steps(history, name)
    since = [one for one in scored if best is None or one.step > best.step]
    return len(since) >= patience


def _is_better(scored: ScoredStep, best: ScoredStep) -> bool:
    if scored.metric in LOWER_IS_BETTER:
        return scored.value < best.value
    return scored.value > best.value
