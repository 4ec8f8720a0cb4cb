"""The metrics as Hugging Face's evaluate loads them, without a network.

Needs bubblewrap or user namespaces for `code`. About fifteen seconds, most of it imports.
"""

import evaluate
import pytest

from eval.task_scores import score, score_intervals
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("name", "outputs", "references", "more"),
    [
        ("gsm8k", ["The answer is: 18", "The answer is: 17"], ["18", "18"], {}),
        ("math", ["The answer is: 0.5", "The answer is: 0.6"], [r"\frac{1}{2}"] * 2, {}),
        (
            "commonsense",
            ["the correct answer is true", "false"],
            ["true", "true"],
            {"task": "boolq"},
        ),
        (
            "code",
            ["def f(x):\n    return x + 1", "def f(x):\n    return x"],
            [{"tests": "assert f(1) == 2", "entry_point": "f"}] * 2,
            {},
        ),
        ("gsm8k", ["The answer is: 18", "#### 18"], ["18", "18"], {"grader": "literature"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_half_is_right(
    name: str, outputs: list, references: list, more: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    metric = evaluate.load(f"eval/metrics/{name}")
    assert metric.compute(predictions=outputs, references=references, **more) == {
        "accuracy": 0.5,
        "n": 2,
    }


@pytest.mark.parametrize(
    ("config", "task", "outputs", "references"),
    [
        ("cola", "cola", [1, 0, 1, 1], [1, 0, 0, 1]),
        ("mnli_mismatched", "mnli", [0, 1, 2, 2], [0, 1, 2, 0]),
        ("stsb", "stsb", [0.5, 2.25, 4.0, 4.5], [0.0, 2.5, 5.0, 3.75]),
    ],
)
def test_glue_scores_as_the_functions_do(
    config: str, task: str, outputs: list, references: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    found = evaluate.load("eval/metrics/glue", config).compute(
        predictions=outputs, references=references, seed=3
    )
    assert found.pop("intervals") == score_intervals(task, outputs, references, seed=3)
    assert found == score(task, outputs, references) | {"n": 4}


@pytest.mark.parametrize("config", ["mrpc_matched", "none", None])
def test_glue_refuses_an_unknown_task(config: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=r"no task .* of GLUE; there are: cola, sst2"):
        evaluate.load("eval/metrics/glue", config)
