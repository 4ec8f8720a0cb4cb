"""GSM8K as a metric of Hugging Face's evaluate: `evaluate.load("eval/metrics/gsm8k")`, in the repository's folder."""

import datasets
import evaluate

from eval.tasks.gsm8k import grade


class Gsm8k(evaluate.Metric):
    """Share of outputs that give the reference as their final answer; see eval.tasks.gsm8k.grade."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions: list[str], references: list[str], protocol: str = "strict") -> dict:
        passed = [grade(output, reference, protocol) for output, reference in zip(predictions, references, strict=True)]
        return {"accuracy": sum(passed) / len(passed) if passed else None, "n": len(passed)}
