"""What is said of a calibration whose tokens do not determine the tail."""

from launch.calibration.report import doubts
from launch.config.schema import validate


def recipe(**adapter: object):  # noqa: ANN201
    return validate({"model": {"name": "m"}, "data": {"path": "d"}, "adapter": adapter})


MODULES = {
    "q": {"size": 64, "reach": 64, "rank": 4},
    "gate": {
        "size": 160,
        "reach": 64,
        "rank": 4,
    },  # its tail is what the weight cannot reach, whatever the tokens
    "up": {
        "size": 66,
        "reach": 64,
        "rank": 4,
    },  # two vectors that the weight cannot reach, and two others
}


def test_too_few_tokens_are_warned_of_where_they_decide_the_tail() -> None:
    (line,) = doubts(MODULES, 63, recipe())
    assert line.startswith(
        "warning: 63 calibration tokens do not determine the tail of 2 modules, such as q of 64"
    )
    assert "calibration.samples" in line


def test_enough_tokens_and_other_ends_of_the_spectrum_are_not() -> None:
    assert doubts(MODULES, 64, recipe()) == []
    assert doubts(MODULES, 1, recipe(eigen_select="largest")) == []
    assert doubts({"gate": MODULES["gate"]}, 1, recipe()) == []
