"""Proves who is warned that the calibration's tokens do not determine the tail of the spectrum.

Needs nothing; takes 2 seconds.
"""

from launch.calibration.report import list_warnings
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
