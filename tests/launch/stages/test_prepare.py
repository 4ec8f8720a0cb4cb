"""A run does not resume with other inputs than it began with; the error names the field.

What may surprise about the rows is printed once.

Needs nothing; 2 s.
"""

from types import SimpleNamespace

import pytest

from launch.calibration import batches
from launch.config.loading import validate_recipe
from launch.data.token_set import make_text_set
from launch.runtime.errors import UserError
from launch.stages import prepare
from launch.stages.prepare import count_earlier_seconds, find_checkpoint
from tests.support.sweeps import make_data

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


def test_held_out_rows_that_are_calibrated_on_are_named_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    for module in (batches, prepare):
        monkeypatch.setattr(module, "print_rank0", lines.append)
    monkeypatch.setattr(prepare.dist, "get_world_size", lambda: 1)
    calibration = {"data": {"path": "c.jsonl"}}
    sections = {"model": {"name": "m"}, "data": {"path": "d.jsonl"}, "calibration": calibration}
    recipe = validate_recipe(sections)
    data = make_data() | {"held_out_trained": 1, "held_out_calibrated": 2}
    tokens = make_text_set([[1, 2]] * 3)
    calibrated = SimpleNamespace(tokens=tokens, data=data)
    inputs = SimpleNamespace(tokens=tokens, dev={}, data=data, calibration=calibrated)
    batches.print_calibration_rows(recipe, inputs)  # all that launch/calibrate.py prints of them
    said = "data.held_out: 2 held-out rows are among those of calibration.data too"
    assert lines[1:] == [said]
    prepare._print_rows(recipe, inputs, [[0, 1, 2]])
    assert lines.count(said) == 1
    assert sum(line.startswith("data.held_out: 1 held-out rows are trained on") for line in lines)


@pytest.mark.parametrize(("calibration", "seconds"), [({}, 142.0), ({"path": "c"}, 42.0)])
def test_seconds_before_a_resume_are_those_of_the_run_itself(
    calibration: dict, seconds: float
) -> None:
    history = [{"seconds": 10.0, "scoring_seconds": 2.0}, {"seconds": 40.0}]
    saved = SimpleNamespace(facts={"calibration_seconds": 100.0}, history=history)
    sections = {"model": {"name": "m"}, "data": {"path": "d"}, "calibration": calibration}
    assert count_earlier_seconds(saved, validate_recipe(sections)) == seconds
