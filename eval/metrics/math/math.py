"""MATH as a metric of evaluate.

`evaluate.load("eval/metrics/math")`, in the repository's root.
"""

from functools import partial

import evaluate

from eval.answer_metric import compute_accuracy, make_metric_info
from eval.tasks.base import Grader
from eval.tasks.math import grade_answer


class Math(evaluate.Metric):
    """The share of responses that give the reference; see eval.tasks.math.grade_answer."""

    def _info(self) -> evaluate.MetricInfo:
        return make_metric_info(self.__doc__)

    def _compute(
        self, predictions: list[str], references: list[str], grader: Grader = "strict"
    ) -> dict:
        return compute_accuracy(partial(grade_answer, grader=grader), predictions, references)
