"""What the metrics of answers in eval/metrics/ share."""

from collections.abc import Callable

import datasets
import evaluate


def info(description: str) -> evaluate.MetricInfo:
    """Of a metric of texts: outputs as predictions, bare final answers as references."""
    text = datasets.Value("string")
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description="",
        features=datasets.Features({"predictions": text, "references": text}),
    )


def share(grade: Callable[[str, str], bool], outputs: list[str], references: list[str]) -> dict:
    """{accuracy (fraction; None of nothing), n}."""
    passed = [
        grade(output, reference) for output, reference in zip(outputs, references, strict=True)
    ]
    return {"accuracy": sum(passed) / len(passed) if passed else None, "n": len(passed)}
