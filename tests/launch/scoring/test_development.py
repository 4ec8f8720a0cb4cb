"""Development rows are scored at each epoch's end, by scipy's numbers; what cannot be scored is refused.

Needs nothing. Takes 2 s.
"""

from pathlib import Path

import pytest
import torch
from scipy import stats

from eval.task_scores import score_intervals
from launch.config.task import Task
from launch.data.token_set import TokenSet
from launch.run.results import describe_task_score
from launch.runtime.distributed import start_process_group, stop_process_group
from launch.runtime.errors import UserError
from launch.scoring import development
from launch.scoring.development import check_dev, find_epoch_ends, score_sets, summarise_epochs

TASK = Task(kind="classification", name="mrpc", labels=["a", "b", "c"], sentence1="text")


def make_tokens(labels: list[int] | list[float]) -> TokenSet:
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


def test_the_scores_of_a_regression_and_their_intervals_are_those_of_the_kept_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    labels = torch.randn(20).double()
    by_step = [
        labels + noise * torch.randn(20).double() for noise in (0.1, 2.0)
    ]  # the first is best
    task, history = Task(kind="regression", sentence1="text"), []
    dev = {"prices": make_tokens(labels.tolist())}
    start_process_group()
    try:
        for step, numbers in enumerate(by_step, start=1):
            monkeypatch.setattr(
                development, "predict_rows", lambda *_, numbers=numbers: numbers[:, None]
            )
            scored = score_sets(None, None, dev, task, tmp_path, history, step, float(step))
            history.append({"step": step, "epoch": float(step), "dev": scored})
    finally:
        stop_process_group()
    found = summarise_epochs(history, dev, task, tmp_path)["prices"]
    assert (found.metric, found.n, len(found.epochs)) == ("pearson", 20, 2)
    assert found.most_frequent is None
    for epoch, numbers in ((found.best, by_step[0]), (found.last, by_step[1])):
        pair = (numbers.tolist(), labels.tolist())
        expected = {
            "pearson": stats.pearsonr(*pair).statistic,
            "spearman": stats.spearmanr(*pair).statistic,
        }
        assert epoch.values == pytest.approx(expected)
        assert epoch.intervals == score_intervals("regression", *pair, kind="regression")


def test_an_epoch_that_predicts_one_label_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_step = [torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0]] * 3)]
    dev = {"mrpc": make_tokens([1, 0, 1])}
    task = Task(kind="classification", name="mrpc", labels=["a", "b"], sentence1="text")
    history = []
    start_process_group()
    try:
        for step, outputs in enumerate(by_step, start=1):
            monkeypatch.setattr(development, "predict_rows", lambda *_, outputs=outputs: outputs)
            scored = score_sets(None, None, dev, task, tmp_path, history, step, float(step))
            history.append({"step": step, "epoch": float(step), "dev": scored})
    finally:
        stop_process_group()
    found = summarise_epochs(history, dev, task, tmp_path)["mrpc"]
    assert found.most_frequent == found.last.values["accuracy"] == pytest.approx(2 / 3)
    assert (found.best.constant, found.last.constant) == (None, "predictions")
    described = describe_task_score(found)
    assert described.count("all predictions the same") == 1
    assert described.endswith("; n = 3, 66.7 % of them with the most frequent label")
    # Other rows chose an epoch between this set's last and best.
    other = found.epochs[0].model_copy(update={"step": 9, "values": {"accuracy": 0.5}})
    among = found.model_copy(update={"epochs": [other, *found.epochs]})
    assert describe_task_score(among, exported_step=2) == described
    assert "; exported epoch 1: accuracy 0.5000; n" in describe_task_score(among, exported_step=9)


@pytest.mark.parametrize(
    ("num_examples", "sizes", "expected"),
    [
        (50, [6] * 25, {9: 1.0, 17: 2.0, 25: 3.0}),  # two of the steps straddle two epochs
        (50, [6] * 20, {9: 1.0, 17: 2.0, 20: 2.4}),
        (50, [6] * 8 + [2], {9: 1.0}),
        (4, [10, 2], {1: 2.0, 2: 3.0}),  # a step of more than two epochs
        (50, [6] * 3, {3: 0.36}),
        (50, [], {}),
    ],
)
def test_rows_are_scored_after_the_step_that_trains_an_epochs_last_row(
    num_examples: int, sizes: list[int], expected: dict[int, float]
) -> None:
    assert find_epoch_ends(num_examples, [range(size) for size in sizes]) == expected
