"""The commonsense suites as a metric: `evaluate.load("eval/metrics/commonsense")`, in the repository's folder."""

from functools import partial

import evaluate

from eval.answer_metric import info, share
from eval.tasks.commonsense import grade


class Commonsense(evaluate.Metric):
    """Share of outputs that give the reference as their final answer; see eval.tasks.commonsense.grade."""

    def _info(self) -> evaluate.MetricInfo:
        return info(self.__doc__)

    def _compute(
        self, predictions: list[str], references: list[str], task: str, protocol: str = "strict"
    ) -> dict:
        return share(partial(grade, task=task, protocol=protocol), predictions, references)
