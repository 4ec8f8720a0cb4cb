"""MATH as a metric of evaluate: `evaluate.load("eval/metrics/math")`, in the repository's folder."""

from functools import partial

import evaluate

from eval.answer_metric import info, share
from eval.tasks.math import grade


class Math(evaluate.Metric):
    """Share of outputs that give the reference as their final answer; see eval.tasks.math.grade."""

    def _info(self) -> evaluate.MetricInfo:
        return info(self.__doc__)

    def _compute(
        self, predictions: list[str], references: list[str], protocol: str = "strict"
    ) -> dict:
        return share(partial(grade, protocol=protocol), predictions, references)
