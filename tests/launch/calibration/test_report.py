"""Proves who is warned that the calibration's tokens do not determine the tail of the spectrum.

Needs nothing; takes 2 seconds.
"""

from launch.calibration.report import list_layers, list_warnings
from launch.config.loading import validate_recipe
from launch.config.schema import Recipe

MODULES = {
    "q": {"size": 64, "reach": 64, "rank": 4},
    # Its tail is what the weight cannot reach, whatever the tokens.
    "gate": {"size": 160, "reach": 64, "rank": 4},
    # Two vectors of its tail are what the weight cannot reach, the two others depend on the tokens.
    "up": {"size": 66, "reach": 64, "rank": 4},
}


def make_recipe(**adapter: object) -> Recipe:
    return validate_recipe({"model": {"name": "m"}, "data": {"path": "d"}, "adapter": adapter})


def test_too_few_tokens_are_warned_of_where_they_decide_the_tail() -> None:
    (line,) = list_warnings(MODULES, 63, make_recipe())
    assert line.startswith(
        "warning: 63 calibration tokens do not determine the tail of 2 modules, such as q of 64"
    )
    assert "calibration.samples" in line


def test_enough_tokens_and_other_ends_of_the_spectrum_are_not() -> None:
    assert list_warnings(MODULES, 64, make_recipe()) == []
    assert list_warnings(MODULES, 1, make_recipe(eigen_select="largest")) == []
    assert list_warnings({"gate": MODULES["gate"]}, 1, make_recipe()) == []


def test_a_modules_layer_is_the_first_number_in_its_name() -> None:
    """A run may adapt the upper layers alone, or one kind of module in fewer layers than another."""
    upper = [f"model.layers.{i}.self_attn.q_proj" for i in (10, 11, 13)]
    assert list_layers(upper) == [10, 11, 13]
    experts = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in (0, 1) for e in (0, 1)]
    assert list_layers(experts) == [0, 1, 2, 3]
    assert list_layers(["encoder.q_proj", "decoder.q_proj"]) == [0, 1]
