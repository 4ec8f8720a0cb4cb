"""GLUE's metrics as a metric of evaluate.

`evaluate.load("eval/metrics/glue", "mrpc")`, in the repository's root. `mnli_matched` and
`mnli_mismatched` are `mnli` on one of its two development sets.
"""

import datasets
import evaluate

from eval.glue import GLUE
from eval.task_scores import score, score_intervals


class Glue(evaluate.Metric):
    """The metrics of one task of GLUE, with 95 % intervals; see eval.task_scores."""

    def _task(self) -> str:
        task = self.config_name.removesuffix("_matched").removesuffix("_mismatched")
        if task not in GLUE or (task != self.config_name and task != "mnli"):
            raise ValueError(f"no task {self.config_name!r} of GLUE; there are: {', '.join(GLUE)}")
        return task

    def _info(self) -> evaluate.MetricInfo:
        kind = "float64" if GLUE[self._task()].kind == "regression" else "int64"
        value = datasets.Value(kind)
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: list, references: list, seed: int = 0) -> dict:
        task = self._task()
        intervals = score_intervals(task, predictions, references, seed=seed)
        scores = score(task, predictions, references)
        return {**scores, "intervals": intervals, "n": len(references)}
