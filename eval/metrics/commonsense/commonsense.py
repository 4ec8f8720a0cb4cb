"""The commonsense suites as a metric of evaluate: `evaluate.load("eval/metrics/commonsense")`, in the repository."""

import datasets
import evaluate

from eval.tasks.commonsense import grade


class Commonsense(evaluate.Metric):
    """Share of outputs that give the reference as their final answer; see eval.tasks.commonsense.grade."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions: list[str], references: list[str], task: str, protocol: str = "strict") -> dict:
        passed = [
            grade(output, reference, task, protocol) for output, reference in zip(predictions, references, strict=True)
        ]
        return {"accuracy": sum(passed) / len(passed) if passed else None, "n": len(passed)}
