"""What the metrics of answers in eval/metrics share."""

from collections.abc import Callable

import datasets
import evaluate


def make_metric_info(description: str) -> evaluate.MetricInfo:
    """Describe a metric of texts: responses as predictions, bare final answers as references."""
    text = datasets.Value("string")
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description="",
        features=datasets.Features({"predictions": text, "references": text}),
    )


def compute_accuracy(
    grade: Callable[[str, str], bool], outputs: list[str], references: list[str]
) -> dict:
    """Return {accuracy (a fraction, or None if there are no outputs), n}."""
    pairs = zip(outputs, references, strict=True)
    passed = [grade(output, reference) for output, reference in pairs]
    return {"accuracy": sum(passed) / len(passed) if passed else None, "n": len(passed)}
