"""Proves the angles between two calibrations on worked cases, and which two may be compared.

Needs nothing; takes 3 seconds.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from launch.calibration import store
from launch.calibration.compare_calibrations import compare_calibrations, compare_spans
from launch.runtime.errors import UserError

BASE = {"name": "base", "weights_sha256": "ab"}
MANIFEST = {  # of an earlier version, without calibration.statistics and task
    "method": "astra",
    "base": BASE,
    "dtype": "float32",
    "data": {"path": "rows", "tokens_sha256": "cd" * 32},
    "max_length": 300,
    "sample_ids": [1, 2, 3],
    "seed": 0,
    "eigen_select": "smallest",
    "corda_mode": None,
    "scaling": None,
    "rank": 2,
    "targets": ["q_proj", "up_proj"],
}
OTHER = {"data": {"path": "text", "tokens_sha256": "ef" * 32}, "calibration_data": {"path": "text"}}
DEGREES = {"layers.0.q_proj": (0, 30), "layers.1.q_proj": (10, 90), "layers.0.up_proj": (0, 0)}


def turn(first: float, second: float) -> Tensor:
    """Return the plane of e1 and e2, (5, 2), turned by two angles in degrees into e3 and e4."""
    plane = torch.zeros(5, 2, dtype=torch.float64)
    for column, degrees in enumerate((first, second)):
        plane[column, column] = math.cos(math.radians(degrees))
        plane[column + 2, column] = math.sin(math.radians(degrees))
    return plane


def write(folder: Path, spans: dict[str, dict[str, Tensor]], **values: object) -> Path:
    """Write a finished calibration with what it found of each module."""
    store.begin_calibration(folder, MANIFEST | values)
    for number, (name, solution) in enumerate(spans.items()):
        store.save_window(folder, number, {name: solution}, 1.0)
    store.finish_calibration(folder, {})
    return folder


def write_pair(folder: Path, **others: object) -> tuple[Path, Path]:
    """Write Astra's calibrations whose subspaces are DEGREES apart, in other bases."""
    mix = torch.linalg.qr(torch.tensor([[1.0, 2], [3, 4]], dtype=torch.float64)).Q
    values = torch.zeros(2, dtype=torch.float64)

    def solve(span: Tensor) -> dict[str, Tensor]:
        return {"vectors": span, "values": values}

    own = write(folder / "own", {name: solve(turn(0, 0)) for name in DEGREES})
    turned = {name: solve(turn(*degrees) @ mix) for name, degrees in DEGREES.items()}
    return own, write(folder / "other", dict(reversed(turned.items())), **OTHER | others)


def test_angles_are_those_by_which_the_planes_were_turned(tmp_path: Path) -> None:
    page = compare_calibrations(*write_pair(tmp_path), tmp_path / "angles")
    found = json.loads((tmp_path / "angles" / "angles.json").read_text())["B0"]
    assert list(found) == ["layers.0.q_proj", "layers.0.up_proj", "layers.1.q_proj"]
    for name, degrees in DEGREES.items():
        module = found[name]
        assert (module["size"], module["rank"]) == (5, 2)
        assert module["largest_angle"] == pytest.approx(max(degrees), abs=1e-6)
        assert module["median_angle"] == pytest.approx(min(degrees), abs=1e-6)  # the lower of two
        overlap = sum(math.cos(math.radians(angle)) ** 2 for angle in degrees) / 2
        assert module["overlap"] == pytest.approx(overlap, abs=1e-12)
    assert "| q_proj (2) | 5 | 2 | 0.0 to 10.0 | 30.0 to 90.0 | 0.485 to 0.875 | 0.400 |" in page
    assert "| 0 | 0.0 | 0.0 |\n| 1 | 10.0 |  |" in page
    assert "3 examples of the training rows rows cdcdcdcd, seed 0" in page
    assert "3 examples of text efefefef, seed 0" in page
    assert "The seeds differ" not in page
    assert (tmp_path / "angles" / "README.md").read_text().startswith(page)
    assert (tmp_path / "angles" / "overlap_B0.png").read_bytes().startswith(b"\x89PNG")


def test_factors_are_compared_on_either_side_that_has_one(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(2, 2, generator=draw, dtype=torch.float64)
    zeros = torch.zeros(7, 2, dtype=torch.float64)
    settings = {"method": "eva", "eigen_select": None}
    eva = [
        write(tmp_path / f"eva{i}", {"q_proj": {"a0": span.T, "b0": zeros}}, **settings)
        for i, span in enumerate((turn(0, 0), turn(20, 40) @ mix))
    ]
    compare_calibrations(*eva, tmp_path / "eva")
    found = json.loads((tmp_path / "eva" / "angles.json").read_text())
    assert found.keys() == {"A0"}
    assert found["A0"]["q_proj"]["largest_angle"] == pytest.approx(40, abs=1e-6)
    settings = {"method": "corda", "eigen_select": None, "corda_mode": "kpm"}
    corda = [
        write(tmp_path / f"corda{i}", {"q_proj": {"a0": a.T, "b0": b @ mix}}, **settings)
        for i, (a, b) in enumerate([(turn(0, 0), turn(0, 0)), (turn(5, 5), turn(60, 0))])
    ]
    assert "corda kpm" in compare_calibrations(*corda, tmp_path / "corda")
    found = json.loads((tmp_path / "corda" / "angles.json").read_text())
    assert found["A0"]["q_proj"]["largest_angle"] == pytest.approx(5, abs=1e-6)
    assert found["B0"]["q_proj"]["largest_angle"] == pytest.approx(60, abs=1e-6)


def test_random_subspaces_overlap_by_r_over_d() -> None:
    draw = torch.Generator().manual_seed(1)
    spans = [
        torch.linalg.qr(torch.randn(400, 40, generator=draw, dtype=torch.float64)).Q
        for _ in range(2)
    ]
    assert compare_spans(*spans).overlap == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"method": "corda"}, "adapter.method"),
        ({"eigen_select": "largest"}, "adapter.eigen_select"),
        ({"rank": 3}, "adapter.rank"),
        ({"base": BASE | {"weights_sha256": "00"}}, "model.name"),
        ({"exclude": ["layers.0.*"]}, "adapter.exclude"),
        ({"dtype": "bfloat16"}, "model.dtype"),
        ({"statistics": "reference"}, "calibration.statistics"),
        ({"scaling": 2.0}, "adapter.alpha"),
        ({"task": "classification"}, "task.kind"),
        ({"max_length": 200}, "data.max_length"),
    ],
)
def test_what_differs_beside_the_examples_is_refused(
    values: dict, field: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"^--compare: .* differ in {field} "):
        compare_calibrations(*write_pair(tmp_path, **values), tmp_path / "angles")
    assert not (tmp_path / "angles").exists()


def test_plain_text_is_compared_with_rows_of_an_earlier_version(tmp_path: Path) -> None:
    text = {"calibration_data": {"path": "text", "text": "ctx"}, "prompt": None}
    own, other = write_pair(tmp_path, statistics="exact", **text)
    assert "3 examples of text" in compare_calibrations(own, other, tmp_path / "angles")


def test_another_seed_is_said_and_a_folder_without_a_calibration_is_refused(tmp_path: Path) -> None:
    own, other = write_pair(tmp_path, seed=1)
    assert "The seeds differ" in compare_calibrations(own, other, tmp_path / "angles")
    with pytest.raises(UserError, match=r"^--compare: .*nowhere has none"):
        compare_calibrations(own, tmp_path / "nowhere", tmp_path / "angles")
