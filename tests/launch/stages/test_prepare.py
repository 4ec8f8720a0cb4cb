"""A run does not resume with other inputs than it began with; the error names the field.

Needs nothing; 2 s.
"""

from types import SimpleNamespace

import pytest

from launch.runtime.errors import UserError
from launch.stages.prepare import find_checkpoint

INPUTS = {"model.dtype": "float32", "model.name": "w", "data.path": "t", "eval.other_text": "o"}
MEASURED = ["held_out", "other_text"]


def make_store(inputs: dict[str, str], before: list[str]) -> SimpleNamespace:
    """Make a store whose newest checkpoint was made with `inputs`."""
    facts = {"inputs": inputs, "before": dict.fromkeys(before)}
    return SimpleNamespace(find_newest=lambda: SimpleNamespace(folder="step-5", facts=facts))


def test_the_same_inputs_resume() -> None:
    assert find_checkpoint(make_store(INPUTS, MEASURED), INPUTS, MEASURED).folder == "step-5"
    # A checkpoint of an earlier version knows neither the dtype nor the other text.
    earlier = {"model.name": "w", "data.path": "t"}
    assert find_checkpoint(make_store(earlier, MEASURED), INPUTS, MEASURED).folder == "step-5"
    assert find_checkpoint(SimpleNamespace(find_newest=lambda: None), INPUTS, MEASURED) is None


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("model.dtype", r"model\.dtype: other is not what this run began with"),
        ("data.path", r"data\.path: its content is not what this run began with"),
        ("eval.other_text", r"eval\.other_text: its content is not what this run began with"),
    ],
)
def test_other_inputs_are_refused(field: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        find_checkpoint(make_store(INPUTS, MEASURED), INPUTS | {field: "other"}, MEASURED)


def test_a_loss_that_was_not_measured_before_training_is_refused() -> None:
    without = {name: content for name, content in INPUTS.items() if name != "eval.other_text"}
    with pytest.raises(UserError, match=r"^eval\.other_text: was not measured before training"):
        find_checkpoint(make_store(without, ["held_out"]), INPUTS, MEASURED)
