"""GSM8K as a metric of evaluate: `evaluate.load("eval/metrics/gsm8k")`, in the repository's folder."""

from functools import partial

import evaluate

from eval.answer_metric import info, share
from eval.tasks.gsm8k import grade


class Gsm8k(evaluate.Metric):
    """Share of outputs that give the reference as their final answer; see eval.tasks.gsm8k.grade."""

    def _info(self) -> evaluate.MetricInfo:
        return info(self.__doc__)

    def _compute(
        self, predictions: list[str], references: list[str], protocol: str = "strict"
    ) -> dict:
        return share(partial(grade, protocol=protocol), predictions, references)
