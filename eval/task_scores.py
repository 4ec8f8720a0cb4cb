"""Score predictions of classes and numbers: GLUE's metrics, and their intervals by bootstrap.

The metrics are functions of arrays whose last axis holds the rows, so that all resamples of a
bootstrap are scored at once. They give what scikit-learn and scipy give, which GLUE's scripts use,
except where a correlation is undefined: scipy's nan is 0 here, as scikit-learn's Matthews
correlation is.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from eval.errors import EvalError
from eval.glue import Kind, Metric, list_metrics

RESAMPLES = 2000  # of the rows, for an interval
BATCH = 2**22  # numbers of resamples that are in memory at a time
POSITIVE = 1  # the class that F1 is of: equivalent (MRPC), duplicate (QQP)

Values = Sequence[int] | Sequence[float] | np.ndarray


def score(
    task: str, predictions: Values, labels: Values, *, kind: Kind = "classification"
) -> dict[str, float]:
    """Score the predictions for a development set.

    Args:
        task: a name in eval.glue.GLUE, or any other.
        predictions: (rows,), indices of classes, or numbers for a regression.
        labels: (rows,), likewise.
        kind: of a task that is not one of GLUE's.

    Returns:
        Metric -> value, a fraction; the first metric is the one that epochs are compared by.
        Correlations are between -1 and 1, and 0 where one side is constant, which leaves them
        undefined; `find_constant` says so.

    Raises:
        EvalError: the two differ in length or have fewer than two rows; a value is not finite; or
            the task has F1 and a class is neither 0 nor 1.
    """
    metrics = list_metrics(task, kind)
    arrays = _check_values(predictions, labels, metrics)
    return {metric: float(METRICS[metric](*arrays)) for metric in metrics}


def score_intervals(
    task: str,
    predictions: Values,
    labels: Values,
    *,
    kind: Kind = "classification",
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval of each metric of `score`: the percentile bootstrap over rows.

    It says how much the metric would vary with another development set of the same size, not with
    another training seed. Every metric, and every call with the same `seed` and number of rows, has
    the same resamples. The interval of a metric that is the same in all resamples (all rows right,
    or all predictions alike for a correlation) has no width.

    Args, Raises: as `score`.
    """
    metrics = list_metrics(task, kind)
    arrays = _check_values(predictions, labels, metrics)
    intervals = {}
    for metric in metrics:
        result = stats.bootstrap(
            arrays,
            lambda p, t, axis, compute=METRICS[metric]: compute(p, t),
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, BATCH // len(arrays[0])),
            confidence_level=0.95,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        intervals[metric] = (
            float(result.confidence_interval.low),
            float(result.confidence_interval.high),
        )
    return intervals


def find_constant(predictions: Values, labels: Values) -> str | None:
    """Return "predictions" or "labels" where all of these are the same value, else None.

    Correlations with a constant are undefined, and `score` gives 0 for them.
    """
    for name, values in (("predictions", predictions), ("labels", labels)):
        if len(np.unique(values)) == 1:
            return name
    return None


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the share of rows whose class is right; (..., rows) -> (...)."""
    return np.mean(predictions == labels, axis=-1)


def f1(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return F1 of class 1, and 0 where that is neither predicted nor there; (..., rows) -> (...).

    This is sklearn.metrics.f1_score with its defaults.
    """
    predicted, actual = predictions == POSITIVE, labels == POSITIVE
    right = np.sum(predicted & actual, axis=-1)
    return _divide(2.0 * right, np.sum(predicted, axis=-1) + np.sum(actual, axis=-1))


def matthews(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return Matthews' correlation for any number of classes; (..., rows) -> (...).

    It is 0 where all predictions or all labels are one class, as in
    sklearn.metrics.matthews_corrcoef. Source: Gorodkin 2004, Computational Biology and Chemistry
    28, 367-374, whose R_K is Matthews' for two classes.
    """
    rows = float(predictions.shape[-1])
    right = np.sum(predictions == labels, axis=-1)
    covariance = rows * right  # times rows**2, as the two variances are
    variance_predicted = variance_actual = rows**2
    for name in np.union1d(predictions, labels):
        predicted = np.sum(predictions == name, axis=-1, dtype=np.float64)
        actual = np.sum(labels == name, axis=-1, dtype=np.float64)
        covariance = covariance - predicted * actual
        variance_predicted = variance_predicted - predicted**2
        variance_actual = variance_actual - actual**2
    return _divide(covariance, np.sqrt(variance_predicted * variance_actual))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation, and 0 where one side is constant; (..., rows) -> (...)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        found = stats.pearsonr(predictions, labels, axis=-1).statistic
    return np.where(np.isnan(found), 0.0, found)


def spearman(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation, and 0 where one side is constant; (..., rows) -> (...).

    Ties have their mean rank, as in scipy.stats.spearmanr, which takes no batch of pairs.
    """
    return pearson(stats.rankdata(predictions, axis=-1), stats.rankdata(labels, axis=-1))


METRICS: dict[Metric, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide, with 0 where the denominator is 0."""
    return np.where(denominator == 0, 0.0, numerator / np.where(denominator == 0, 1, denominator))


def _check_values(
    predictions: Values, labels: Values, metrics: Sequence[Metric]
) -> tuple[np.ndarray, np.ndarray]:
    """Return both as arrays that can be scored; see `score` for errors."""
    arrays = (np.asarray(predictions), np.asarray(labels))
    shapes = [array.shape for array in arrays]
    if shapes[0] != shapes[1] or len(shapes[0]) != 1:
        raise EvalError(f"predictions and labels have shapes {shapes[0]} and {shapes[1]}")
    if len(arrays[0]) < 2:
        raise EvalError(f"a score needs at least two rows, not {len(arrays[0])}")
    for name, array in zip(("prediction", "label"), arrays, strict=True):
        wrong = np.flatnonzero(~np.isfinite(array))
        if len(wrong):
            raise EvalError(f"{name} {wrong[0] + 1} is {array[wrong[0]]}, not a finite number")
        other = np.flatnonzero((array != 0) & (array != POSITIVE))
        if "f1" in metrics and len(other):
            raise EvalError(f"{name} {other[0] + 1} is {array[other[0]]}; F1 takes classes 0 and 1")
    if any(metric in metrics for metric in ("pearson", "spearman")):
        return arrays[0].astype(np.float64), arrays[1].astype(np.float64)
    return arrays
