"""The metrics as Hugging Face's evaluate loads them, without a network.

Needs bubblewrap or user namespaces for `code`. About fifteen seconds, most of it imports.
"""

import evaluate
import pytest

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
