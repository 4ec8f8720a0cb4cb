"""The best step and the early stop, as any history of scores has them. Needs nothing; a second."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.run.best import ScoredStep, find_best, list_score_names, stops_early

VALUES = st.lists(
    st.tuples(st.sampled_from([0, 1, 2]), st.floats(allow_infinity=True, allow_nan=True)),
    max_size=30,
)


def make_history(steps: list[tuple[int, float]], metric: str) -> list[dict]:
    """Return a history with a score after every item; its number says how many steps come before."""
    history: list[dict] = []
    for gap, value in steps:
        history += [{"step": len(history) + 1 + i} for i in range(gap)]
        history.append({"step": len(history) + 1, "dev": {"held_out": {metric: value, "n": 3.0}}})
    return history


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
@given(steps=VALUES)
def test_the_best_is_the_first_of_the_best_numbers(
    metric: str, steps: list[tuple[int, float]]
) -> None:
    history = make_history(steps, metric)
    best = find_best(history, "held_out")
    known = [value for _, value in steps if math.isfinite(value)]
    if not known:
        assert best is None
        return
    value = min(known) if metric == "loss" else max(known)
    first = next(
        one for one in history if one.get("dev", {}).get("held_out", {}).get(metric) == value
    )
    assert best == ScoredStep(first["step"], metric, value)


@given(steps=VALUES, patience=st.integers(1, 4))
def test_a_run_stops_once_and_where_a_resumed_one_does(
    steps: list[tuple[int, float]], patience: int
) -> None:
    history = make_history(steps, "loss")
    waited, best, stops = 0, math.inf, set()
    for metrics in history:
        value = metrics.get("dev", {}).get("held_out", {}).get("loss")
        if value is not None:
            is_better = math.isfinite(value) and value < best
            waited, best = (0, value) if is_better else (waited + 1, best)
        if waited >= patience:
            stops.add(metrics["step"])
    found = {
        n for n in range(1, len(history) + 1) if stops_early(history[:n], "held_out", patience)
    }
    assert found == stops


def test_only_the_named_score_counts() -> None:
    history = [
        {"step": 1, "dev": {"mrpc": {"accuracy": 0.5}, "held_out": {"loss": 1.0}}},
        {"step": 2, "dev": {"mrpc": {"accuracy": 0.7}}},
        {"step": 3, "dev": {"held_out": {"loss": 1.5}}},
    ]
    assert list_score_names(history) == ["mrpc", "held_out"]
    assert find_best(history, "mrpc") == ScoredStep(2, "accuracy", 0.7)
    assert find_best(history, "held_out") == ScoredStep(1, "loss", 1.0)
    assert find_best(history, "gsm8k") is None
    assert stops_early(history, "held_out", 1) and not stops_early(history, "mrpc", 1)
    assert not stops_early(history, None, None) and not stops_early(history, "held_out", None)
