"""The commonsense benchmarks as a metric of evaluate.

`evaluate.load("eval/metrics/commonsense")`, in the repository's root. `task` names one of them.
"""

from functools import partial

import evaluate

from eval.answer_metric import compute_accuracy, make_metric_info
from eval.tasks.base import Grader
from eval.tasks.commonsense import grade_label


class Commonsense(evaluate.Metric):
    """The share of responses that give the reference; see eval.tasks.commonsense.grade_label."""

    def _info(self) -> evaluate.MetricInfo:
        return make_metric_info(self.__doc__)

    def _compute(
        self, predictions: list[str], references: list[str], task: str, grader: Grader = "strict"
    ) -> dict:
        grade = partial(grade_label, name=task, grader=grader)
        return compute_accuracy(grade, predictions, references)
