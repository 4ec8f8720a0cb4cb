"""Programs as a metric of Hugging Face's evaluate: `evaluate.load("eval/metrics/code")`, in the repository's folder.

Each program runs in eval.sandbox.check, apart from its tests.
"""

import datasets
import evaluate

from eval.sandbox.check import Job, check_many


class Code(evaluate.Metric):
    """Share of programs whose function passes its tests; references are {"tests": ..., "entry_point": ...}."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = {"predictions": text, "references": {"tests": text, "entry_point": text}}
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="",
            features=datasets.Features(features),
        )

    def _compute(
        self, predictions: list[str], references: list[dict], timeout: float = 10.0
    ) -> dict:
        jobs = [
            Job(program, of["tests"], of["entry_point"], timeout=timeout)
            for program, of in zip(predictions, references, strict=True)
        ]
        passed = [verdict.passed for verdict in check_many(jobs)]
        return {"accuracy": sum(passed) / len(passed) if passed else None, "n": len(passed)}
