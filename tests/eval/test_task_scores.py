"""GLUE's metrics against scipy's and scikit-learn's values, and the coverage of their intervals.

scikit-learn is no dependency: its values stand here. Needs nothing. Four seconds.
"""

import numpy as np
import pytest
from scipy import stats

from eval.errors import EvalError
from eval.glue import GLUE
from eval.task_scores import f1, find_constant, matthews, score, score_intervals

ROWS = np.arange(60)
LABELS, PREDICTIONS = (ROWS * ROWS // 7) % 2, (ROWS * 3 // 4 + ROWS % 5) % 2
LABELS_OF_3, PREDICTIONS_OF_3 = (ROWS * ROWS // 7) % 3, (ROWS * ROWS // 7 + (ROWS % 4 == 0)) % 3


def test_classes_score_as_with_scikit_learn() -> None:
    # matthews_corrcoef, f1_score and accuracy_score of scikit-learn 1.9.1 on these arrays
    assert score("cola", PREDICTIONS, LABELS)["matthews"] == pytest.approx(
        0.003351988784425186, abs=1e-15
    )
    assert score("mrpc", PREDICTIONS, LABELS) == pytest.approx(
        {"accuracy": 0.5, "f1": 0.5161290322580645}
    )
    found = matthews(PREDICTIONS_OF_3, LABELS_OF_3)
    assert found == pytest.approx(0.6140033447778585, abs=1e-15)


@pytest.mark.parametrize(
    ("labels", "predictions", "value"),
    [
        # tests/test_classification.py of scikit-learn, test_matthews_corrcoef(_multiclass)
        ([0, 0, 1, 1, 2, 2], [2, 2, 0, 0, 1, 1], -0.5),
        ([0, 0, 1, 1, 2, 2], [1, 1, 0, 0, 0, 0], -12 / np.sqrt(24 * 16)),
        ([0, 1, 2, 0, 1, 2, 0, 1, 2], [1, 1, 1, 2, 2, 2, 0, 0, 0], 0.0),
        ([3, 3, 3], [0, 1, 2], 0.0),
        ([0, 1, 2], [3, 3, 3], 0.0),
        ([0, 0, 0, 0], [0, 0, 0, 0], 0.0),
        ([1, 1, 1, 0], [1, 0, 1, 1], -1 / 3),  # the example of matthews_corrcoef's documentation
        ([0, 1, 2, 1], [0, 1, 2, 1], 1.0),
    ],
)
def test_matthews_known_values(labels: list, predictions: list, value: float) -> None:
    found = matthews(np.array(predictions), np.array(labels))
    assert found == pytest.approx(value, abs=1e-15)


def test_matthews_of_two_classes_is_pearson_of_their_indices() -> None:
    expected = stats.pearsonr(PREDICTIONS, LABELS).statistic
    assert matthews(PREDICTIONS, LABELS) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    ("labels", "predictions", "value"),
    [
        ([0, 1, 1, 1], [0, 1, 1, 0], 0.8),  # 2 of 2 found are right, 2 of 3 are found
        ([0, 1, 0], [0, 0, 0], 0.0),
        ([0, 0, 0], [0, 0, 0], 0.0),  # f1_score warns of it and gives 0
        ([0, 0, 0], [1, 1, 1], 0.0),
        ([1, 1, 1], [1, 1, 1], 1.0),
    ],
)
def test_f1_known_values(labels: list, predictions: list, value: float) -> None:
    assert f1(np.array(predictions), np.array(labels)) == pytest.approx(value)


def test_numbers_score_as_with_scipy() -> None:
    labels = (ROWS % 26) / 5  # with ties, as STS-B's
    predictions = np.sin(ROWS) + labels
    assert score("stsb", predictions, labels) == pytest.approx(
        {
            "pearson": stats.pearsonr(predictions, labels).statistic,
            "spearman": stats.spearmanr(predictions, labels).statistic,
        },
        abs=1e-14,
    )


def test_what_is_undefined_is_zero_and_can_be_named() -> None:
    constant, labels = np.full(60, 2.5, dtype=np.float32), ROWS / 12
    assert score("stsb", constant, labels) == {"pearson": 0.0, "spearman": 0.0}
    assert score_intervals("stsb", constant, labels) == dict.fromkeys(
        ("pearson", "spearman"), (0.0, 0.0)
    )
    assert find_constant(constant, labels) == "predictions"
    assert find_constant(labels, constant) == "labels"
    assert find_constant(labels, labels) is None
    assert score("cola", np.ones(60, int), LABELS) == {"matthews": 0.0}


def test_every_task_has_metrics_and_others_have_those_of_their_kind() -> None:
    for name, task in GLUE.items():
        arrays = (ROWS / 3, ROWS / 4) if task.kind == "regression" else (PREDICTIONS, LABELS)
        scores = score(name, *arrays)
        assert tuple(scores) == task.metrics
        assert scores.keys() == score_intervals(name, *arrays).keys()
    assert list(score("reviews", PREDICTIONS_OF_3, LABELS_OF_3)) == ["accuracy"]
    assert list(score("prices", ROWS / 3, ROWS / 4, kind="regression")) == ["pearson", "spearman"]


@pytest.mark.parametrize(
    ("task", "predictions", "labels", "fault"),
    [
        ("cola", [0, 1], [0, 1, 1], r"have shapes \(2,\) and \(3,\)"),
        ("cola", [], [], "at least two rows, not 0"),
        ("cola", [1], [1], "at least two rows, not 1"),
        ("stsb", [0.5, float("nan"), 1.0], [0.0, 1.0, 2.0], "prediction 2 is nan"),
        ("stsb", [0.5, 0.2], [0.0, float("inf")], "label 2 is inf"),
        ("mrpc", [0, 1, 2], [0, 1, 1], "prediction 3 is 2; F1 takes classes 0 and 1"),
        ("mrpc", [0, 1, 1], [0, 1, -1], "label 3 is -1; F1 takes classes 0 and 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    task: str, predictions: list, labels: list, fault: str
) -> None:
    for compute in (score, score_intervals):
        with pytest.raises(EvalError, match=fault):
            compute(task, predictions, labels)


def test_intervals_are_seeded_and_of_rows() -> None:
    first = score_intervals("mrpc", PREDICTIONS, LABELS)
    assert first == score_intervals("mrpc", PREDICTIONS, LABELS)
    assert first != score_intervals("mrpc", PREDICTIONS, LABELS, seed=1)
    scores = score("mrpc", PREDICTIONS, LABELS)
    for metric, (low, high) in first.items():
        assert 0 <= low < scores[metric] < high <= 1


def test_the_interval_of_a_share_is_the_binomial_one() -> None:
    # 300 of 400 rows right: resamples have a binomial number of right ones.
    labels = np.zeros(400, int)
    predictions = (np.arange(400) < 100).astype(int)
    low, high = score_intervals("rte", predictions, labels)["accuracy"]
    expected = np.array(stats.binom.interval(0.95, 400, 0.75)) / 400
    # 2,000 resamples place a quantile within about 2 rows.
    assert (low, high) == pytest.approx(expected, abs=2.5 / 400)


@pytest.mark.parametrize("task", ["cola", pytest.param("stsb", marks=pytest.mark.full)])
def test_the_interval_holds_the_truth_about_95_times_of_100(task: str) -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        if task == "cola":  # two classes, 80 % right on either side: Matthews is 0.6
            truth = 0.6
            labels = generator.integers(0, 2, 200)
            predictions = np.where(generator.random(200) < 0.8, labels, 1 - labels)
        else:
            truth = 0.6
            labels = generator.standard_normal(200)
            predictions = truth * labels + np.sqrt(1 - truth**2) * generator.standard_normal(200)
        low, high = next(iter(score_intervals(task, predictions, labels).values()))
        held += low <= truth <= high
    assert held >= 88  # of 100 draws of 95 %: fewer come once in 800
