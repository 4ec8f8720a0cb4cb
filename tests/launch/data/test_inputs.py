"""Nodes that hold other content under the same names are refused, by the field that names it.

The nodes are simulated: what each would have found stands in for its work. 1 s.
"""

import copy

import pytest
import torch

from launch.config.loading import read_recipe
from launch.data import inputs
from launch.runtime.errors import UserError

NODE = {
    "host": "one",
    "data": {"tokens_sha256": "t", "dev": {"mrpc": {"kept": 9, "cut": 0, "tokens_sha256": "d"}}},
    "calibration_data": {"tokens_sha256": "c"},
    "base": {"weights_sha256": "w", "config_sha256": "x"},
}


@pytest.mark.parametrize(
    ("place", "field"),
    [
        (("data", "tokens_sha256"), "data.path"),
        (("data", "dev", "mrpc", "tokens_sha256"), "task.dev"),
        (("calibration_data", "tokens_sha256"), "calibration.data.path"),
        (("base", "weights_sha256"), "model.name"),
        (("base", "config_sha256"), "model.name"),
    ],
)
def test_nodes_with_other_content_are_refused(
    place: tuple[str, ...], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copy.deepcopy(NODE) | {"host": "two"}
    inner = other
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = "changed"
    monkeypatch.setattr(inputs, "run_on_each_node", lambda _: [NODE, other])
    with pytest.raises(UserError, match=rf"^{field}: its content on two is not one's; copy it$"):
        inputs.prepare_inputs(read_recipe("metamath", []), torch.device("cpu"))
