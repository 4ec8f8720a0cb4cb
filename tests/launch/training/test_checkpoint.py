"""A checkpoint on the disk: whole or passed over, whatever is done to its bytes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from launch.runtime.errors import UserError
from launch.training import checkpoint

FACTS = {"baseline": {"gsm8k": 0.25}, "drift": 1e-7}


def write(run: Path, step: int) -> None:
    tensors = {
        "layer.A.trained": torch.full((4, 3), float(step)),
        "layer.B.trained": torch.ones(2, 4),
    }
    history = [{"step": i + 1, "loss": 1 / (i + 1)} for i in range(step)]
    checkpoint._write(run / checkpoint.FOLDER, step, tensors, FACTS, history)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for step in (2, 5):
        write(folder, step)
    return folder


def test_the_newest_comes_back_as_it_was_saved(run: Path) -> None:
    found = checkpoint.newest(run)
    assert (found.step, found.facts) == (5, FACTS)
    assert [step["loss"] for step in found.history] == [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    assert load_file(found.folder / checkpoint.TENSORS)["layer.A.trained"].unique().tolist() == [
        5.0
    ]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from([checkpoint.TENSORS, checkpoint.METRICS, checkpoint.MANIFEST]),
    how=st.sampled_from(["flip", "truncate", "append", "remove"]),
    where=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_any_damage_is_found(run: Path, name: str, how: str, where: float, bit: int) -> None:
    newest = run / checkpoint.FOLDER / "step-0000005"
    path = newest / name
    content = path.read_bytes()
    at = int(where * len(content))
    match how:
        case "flip":
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        case "truncate":
            path.write_bytes(content[:at])
        case "append":
            path.write_bytes(content + b"x")
        case "remove":
            path.unlink()
    try:
        found = checkpoint.newest(run)
        # A byte of the manifest that JSON does not mind (white space) may change; what it says may not.
        assert found.step == 2 or (name == checkpoint.MANIFEST and found.facts == FACTS)
        if name != checkpoint.MANIFEST:
            assert found.step == 2
    finally:
        path.write_bytes(content)


def test_the_newest_stay_and_leftovers_go(tmp_path: Path) -> None:
    for step in (0, 3, 6, 9):
        write(tmp_path, step)
    folder = tmp_path / checkpoint.FOLDER
    shutil.copytree(
        folder / "step-0000009", folder / "tmp-step-0000012"
    )  # killed while it was written
    (folder / "tmp-step-0000012" / checkpoint.MANIFEST).unlink()
    assert checkpoint.newest(tmp_path).step == 9
    write(tmp_path, 12)
    checkpoint._prune(folder, 12, 2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-0000009", "step-0000012"]


def test_a_damaged_one_is_replaced_when_its_step_comes_again(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write(tmp_path, 3)
    write(tmp_path, 6)
    manifest = tmp_path / checkpoint.FOLDER / "step-0000006" / checkpoint.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"step": 7}))
    assert checkpoint.newest(tmp_path).step == 3
    assert (
        f"checkpoint {manifest.parent} is damaged and passed over: {checkpoint.MANIFEST}"
        in capsys.readouterr().out
    )
    write(tmp_path, 6)
    assert checkpoint.newest(tmp_path).step == 6


def test_a_damaged_one_does_not_take_the_place_of_a_whole_one(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        write(tmp_path, step)
    folder = tmp_path / checkpoint.FOLDER
    for step in (6, 9):
        (folder / f"step-000000{step}" / checkpoint.METRICS).unlink()
    assert checkpoint.newest(tmp_path).step == 3
    write(tmp_path, 8)  # another checkpoint_every than before
    checkpoint._prune(folder, 8, 2)
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-0000003",
        "step-0000008",
        "step-0000009",
    ]
    write(tmp_path, 9)
    checkpoint._prune(folder, 9, 2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-0000008", "step-0000009"]
    assert checkpoint.newest(tmp_path).step == 9


def test_what_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / checkpoint.FOLDER).write_text("in the way")
    with pytest.raises(UserError, match="checkpoint of step 3: cannot write"):
        write(tmp_path, 3)
