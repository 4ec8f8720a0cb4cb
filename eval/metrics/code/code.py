"""Programs as a metric of evaluate.

`evaluate.load("eval/metrics/code")`, in the repository's root. Each program runs in
eval.sandbox.check, apart from its tests.
"""

import datasets
import evaluate

from eval.sandbox.check import Job, check_programs


class Code(evaluate.Metric):
    """The share of programs that pass their tests.

    References are {"tests": ..., "entry_point": ...}.
    """

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
        jobs = []
        for program, reference in zip(predictions, references, strict=True):
            tests, entry_point = reference["tests"], reference["entry_point"]
            jobs.append(Job(program, tests, entry_point, timeout=timeout))
        passed = [verdict.passed for verdict in check_programs(jobs)]
        return {"accuracy": sum(passed) / len(passed) if passed else None, "n": len(passed)}
