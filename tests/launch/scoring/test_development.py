"""Development rows that cannot be scored are refused before the first epoch, and outputs that are not numbers.

Needs nothing. Takes 2 s.
"""

from pathlib import Path

import pytest
import torch

from launch.config.task import Task
from launch.data.token_set import TokenSet
from launch.runtime.distributed import start_process_group, stop_process_group
from launch.runtime.errors import UserError
from launch.scoring import development
from launch.scoring.development import check_dev, score_sets

TASK = Task(kind="classification", name="mrpc", labels=["a", "b", "c"], sentence1="text")


def make_tokens(labels: list[int]) -> TokenSet:
    """Return rows of one token each."""
    count = len(labels)
    return TokenSet(
        tokens=torch.zeros(count, dtype=torch.int32),
        offsets=torch.arange(count + 1),
        prompt_lengths=torch.zeros(count, dtype=torch.int64),
        num_truncated=0,
        num_dropped=0,
        labels=torch.tensor(labels),
    )


def test_rows_that_the_metrics_do_not_take_are_refused() -> None:
    check_dev({"mrpc": make_tokens([0, 1, 1])}, TASK)
    with pytest.raises(UserError, match=r"^task\.dev: mrpc: .* F1 takes classes 0 and 1"):
        check_dev({"mrpc": make_tokens([0, 1, 2])}, TASK)
    with pytest.raises(UserError, match=r"^task\.dev: mrpc: a score needs at least two rows"):
        check_dev({"mrpc": make_tokens([0])}, TASK)
    numbers = Task(kind="regression", name="stsb", sentence1="text")
    check_dev({"stsb": make_tokens([-1, 1])}, numbers)
    with pytest.raises(UserError, match=r"^task\.dev: stsb: the label of every row is -1"):
        check_dev({"stsb": make_tokens([-1, -1])}, numbers)


def test_sets_of_rows_have_predictions_of_their_own() -> None:
    names = ("hard set", "hard_set", "hard/set", "mrpc")
    assert len({development._name_file(Path("run"), name, 3) for name in names}) == len(names)
    assert development._name_file(Path("run"), "mrpc", 3) == Path(
        "run/predictions/mrpc-step-0000003.jsonl"
    )


def test_outputs_that_are_not_finite_are_no_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = torch.tensor([[0.5, 0.1, 0.0], [float("nan")] * 3], dtype=torch.float64)
    monkeypatch.setattr(development, "predict_rows", lambda *_: outputs)
    start_process_group()
    try:
        with pytest.raises(UserError, match=r"^mrpc: the model gives outputs that are not finite"):
            score_sets(None, None, {"mrpc": make_tokens([0, 1])}, TASK, tmp_path, [], 1, 1.0)
    finally:
        stop_process_group()
    assert not list(tmp_path.iterdir())
