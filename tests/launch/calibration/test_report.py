"""Proves who is warned that the calibration's tokens do not determine the chosen eigenvectors.

Needs nothing; takes 2 seconds.
"""

import pytest

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


# The four of "middle" are numbers 30 to 33 of q, 31 to 34 of up, and of gate 78 to 81, which its weight
# cannot reach. The tokens leave out the numbers from what is not reached up to size - tokens.
@pytest.mark.parametrize(
    ("select", "tokens", "modules"),
    [
        ("smallest", 63, 2),
        ("middle", 33, 2),
        ("random", 4, 3),
        ("largest", 3, 3),
    ],
)
def test_too_few_tokens_are_warned_of_where_they_decide_the_vectors(
    select: str, tokens: int, modules: int
) -> None:
    (line,) = list_warnings(MODULES, tokens, make_recipe(eigen_select=select))
    assert line.startswith(
        f"warning: {tokens} calibration tokens do not determine the {select} eigenvectors of "
        f"{modules} modules, such as q of 64"
    )
    assert "calibration.samples" in line


@pytest.mark.parametrize(
    ("select", "tokens"), [("smallest", 64), ("middle", 35), ("random", 64), ("largest", 4)]
)
def test_enough_tokens_are_not(select: str, tokens: int) -> None:
    assert list_warnings(MODULES, tokens, make_recipe(eigen_select=select)) == []


@pytest.mark.parametrize("select", ["smallest", "middle"])
def test_vectors_that_the_weight_cannot_reach_do_not_depend_on_tokens(select: str) -> None:
    recipe = make_recipe(eigen_select=select)
    assert list_warnings({"gate": MODULES["gate"]}, 1, recipe) == []


def test_a_modules_layer_is_the_first_number_in_its_name() -> None:
    """A run may adapt the upper layers alone, or one kind of module in fewer layers than another."""
    upper = [f"model.layers.{i}.self_attn.q_proj" for i in (10, 11, 13)]
    assert list_layers(upper) == [10, 11, 13]
    experts = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in (0, 1) for e in (0, 1)]
    assert list_layers(experts) == [0, 1, 2, 3]
    assert list_layers(["encoder.q_proj", "decoder.q_proj"]) == [0, 1]
