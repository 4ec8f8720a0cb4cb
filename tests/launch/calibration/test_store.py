"""Proves which runs may take a calibration on disk, and what is said to the others.

Needs nothing; takes 2 seconds.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch.calibration import store as artifact
from launch.methods.base import MethodSettings, crop_solution
from launch.methods.registry import METHODS
from launch.runtime.errors import UserError

MANIFEST = {
    "method": "astra",
    "base": {"name": "base", "weights_sha256": "ab" * 32},
    "dtype": "float32",
    "data": {"path": "rows", "tokens_sha256": "cd" * 32},
    "prompt": "{instruction}",
    "max_length": 512,
    "sample_ids": [3, 1, 2],
    "seed": 0,
    "split_half": False,
    "eigen_select": "smallest",
    "rank": 4,
    "targets": ["q_proj"],
    "conditions": {"host": "a"},
}


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", store=dist.FileStore(str(path), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def found(rank: int, size: int = 9, start: int = 0) -> dict[str, torch.Tensor]:
    """The unit vectors from `start`, in the place of eigenvectors."""
    spectrum = torch.arange(size, dtype=torch.float64)
    vectors = torch.eye(size, dtype=torch.float64)[:, start : start + rank]
    checks = torch.zeros(3, dtype=torch.float64)
    values = spectrum[start : start + rank].clone()
    return {
        "vectors": vectors,
        "values": values,
        "spectrum": spectrum,
        "checks": checks,
        "angles": spectrum.new_empty(0),
    }


def changed(**values: object) -> dict:
    return copy.deepcopy(MANIFEST) | values


def whole(folder: Path, manifest: dict, rank: int = 4, start: int = 0) -> Path:
    assert artifact.begin_calibration(folder, manifest) == (0, 0)
    artifact.save_window(folder, 0, {"layers.0.q_proj": found(rank, start=start)}, 0.5)
    artifact.save_window(folder, 1, {"layers.1.q_proj": found(rank, start=start)}, 1)
    artifact.finish_calibration(folder, {"seconds": 1.5})
    return folder


def read_cropped(folder: Path, name: str, select: str) -> dict[str, torch.Tensor]:
    """Read what a run of rank 2 takes of a module."""
    settings = MethodSettings(1.0, select, "ipm", 0, 0, "projection")

    def crop(solution: dict) -> dict:
        return crop_solution(solution, METHODS["astra"], 2, settings)

    return artifact.read_solution(folder, name, torch.device("cpu"), crop)


# Of the 9 eigenvectors: kept by a calibration of rank 5, and wanted at rank 2.
@pytest.mark.parametrize(
    ("select", "kept", "wanted"), [("smallest", 0, 0), ("largest", 4, 7), ("middle", 2, 3)]
)
def test_a_smaller_rank_takes_what_a_calibration_of_its_own_would_find(
    select: str, kept: int, wanted: int, tmp_path: Path
) -> None:
    whole(tmp_path, changed(eigen_select=select, rank=5), rank=5, start=kept)
    artifact.check_calibration(tmp_path, changed(eigen_select=select, rank=2))
    read = read_cropped(tmp_path, "layers.1.q_proj", select)
    assert torch.equal(read["vectors"], torch.eye(9, dtype=torch.float64)[:, wanted : wanted + 2])
    assert read["values"].tolist() == [wanted, wanted + 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "pissa"}, r"adapter\.method: .*\(astra, here pissa\)"),
        ({"base": {"weights_sha256": "0"}}, r"model\.name: .*another base\.weights_sha256"),
        ({"dtype": "bfloat16"}, r"model\.dtype: .*\(float32, here bfloat16\)"),
        ({"data": {"tokens_sha256": "0"}}, r"data\.path"),
        ({"prompt": "Q"}, r"data\.path: .*prompt"),
        ({"max_length": 256}, r"data\.max_length: .*\(512, here 256\)"),
        ({"sample_ids": [3, 1]}, r"calibration\.samples"),
        ({"seed": 1}, r"calibration\.seed"),
        ({"eigen_select": "largest"}, r"adapter\.eigen_select: .*\(smallest, here largest\)"),
        ({"targets": ["k_proj"]}, r"adapter\.targets"),
        ({"rank": 5}, r"adapter\.rank: 5 vectors are needed .* has 4"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_differs_is_named(values: dict, message: str, tmp_path: Path) -> None:
    whole(tmp_path, MANIFEST)
    with pytest.raises(UserError, match=message):
        artifact.check_calibration(tmp_path, changed(**values))


OTHERS = {"path": "others", "tokens_sha256": "ef" * 32}


def test_other_data_are_named_and_the_same_tokens_are_taken(tmp_path: Path) -> None:
    of_others = changed(data=OTHERS, calibration_data={"path": "others"})
    own, other = whole(tmp_path / "own", MANIFEST), whole(tmp_path / "other", of_others)
    message = r"^calibration\.data: .*other data \(the training rows rows cdcd.*, here others efef"
    with pytest.raises(UserError, match=message):
        artifact.check_calibration(own, of_others)
    message = r"^calibration\.data: .*\(others efef.*, here the training rows rows cdcd"
    with pytest.raises(UserError, match=message):
        artifact.check_calibration(other, MANIFEST)
    artifact.check_calibration(other, of_others)
    # The tokens decide, not where they are or what they are called.
    artifact.check_calibration(other, changed(data=OTHERS | {"path": "copy"}))


def test_what_does_not_decide_the_eigenvectors_may_differ(tmp_path: Path) -> None:
    whole(tmp_path, MANIFEST)
    artifact.check_calibration(tmp_path, changed(conditions={}, split_half=True, rank=3))


def test_random_directions_serve_their_own_rank_only(tmp_path: Path) -> None:
    whole(tmp_path, changed(eigen_select="random"))
    with pytest.raises(UserError, match=r"adapter\.rank: 3"):
        artifact.check_calibration(tmp_path, changed(eigen_select="random", rank=3))


def begin(folder: Path) -> None:
    """Begin the calibration of MANIFEST, and finish one of its windows in 7 s."""
    assert artifact.begin_calibration(folder, MANIFEST) == (0, 0)
    artifact.save_window(folder, 0, {"layers.0.q_proj": found(4)}, 7)


def test_a_calibration_resumes_after_its_last_window_and_keeps_its_time(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(UserError, match=r"calibration\.path: .* is not finished"):
        artifact.check_calibration(tmp_path, MANIFEST)
    # The content decides, not where it is or what it is called.
    elsewhere = changed(
        conditions={"host": "b"},
        base=MANIFEST["base"] | {"name": "copy", "revision": "main"},
        data=MANIFEST["data"] | {"path": "copy"},
    )
    assert artifact.begin_calibration(tmp_path, elsewhere) == (1, 7)


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"seed": 1}, "seed"),
        ({"data": {"tokens_sha256": "0"}, "sample_ids": [3]}, "data.tokens_sha256, sample_ids"),
        ({"rank": 5, "windows": [[1]]}, "rank, windows"),
        ({"batch_size": 2, "split_half": True}, "batch_size, split_half"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_windows_of_another_calibration_are_made_again_and_that_is_said(
    values: dict, keys: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path)
    assert artifact.begin_calibration(tmp_path, changed(**values)) == (0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished.json"]
    line = f"calibration: 1 finished window in {tmp_path} made again: another {keys}\n"
    assert capsys.readouterr().out == line
    artifact.begin_calibration(tmp_path, MANIFEST)  # there is no window yet
    assert not capsys.readouterr().out


def test_missing_and_damaged_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"calibration\.path: .* has none"):
        artifact.check_calibration(tmp_path / "nowhere", MANIFEST)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*manifest\.json"):
        artifact.check_calibration(tmp_path, MANIFEST)
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    with pytest.raises(UserError, match=r"has no solution of layers\.7\.q_proj"):
        read_cropped(tmp_path, "layers.7.q_proj", "smallest")
