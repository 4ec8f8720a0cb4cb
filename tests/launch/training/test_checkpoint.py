"""Proves that a checkpoint on disk is whole or skipped, whatever is done to its bytes.

Needs nothing; takes 3 seconds.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from launch.run.metrics import Metrics
from launch.runtime.errors import DivergedError, UserError
from launch.training import checkpoint
from launch.training.checkpoint import CheckpointStore, name_best_step

FACTS = {"baseline": {"gsm8k": 0.25}, "drift": 1e-7}


def write_checkpoint(store: CheckpointStore, step: int) -> None:
    tensors = {
        "layer.A.trained": torch.full((4, 3), float(step)),
        "layer.B.trained": torch.ones(2, 4),
    }
    history = [{"step": i + 1, "loss": 1 / (i + 1)} for i in range(step)]
    store._write(step, tensors, FACTS, history)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of steps 2 and 5."""
    folder = tmp_path_factory.mktemp("run")
    for step in (2, 5):
        write_checkpoint(CheckpointStore(folder, 2), step)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """The empty store of a run that keeps two checkpoints."""
    return CheckpointStore(tmp_path, 2)


def test_the_newest_comes_back_as_it_was_saved(run: Path) -> None:
    found = CheckpointStore(run, 2).find_newest()
    assert (found.step, found.facts) == (5, FACTS)
    assert [step["loss"] for step in found.history] == [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    assert load_file(found.folder / checkpoint.TENSORS)["layer.A.trained"].unique().tolist() == [
        5.0
    ]


def test_no_checkpoint_is_none(store: CheckpointStore) -> None:
    assert store.find_newest() is None


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
        found = CheckpointStore(run, 2).find_newest()
        # A byte of the manifest that JSON does not mind (white space) may change; what it says may not.
        assert found.step == 2 or (name == checkpoint.MANIFEST and found.facts == FACTS)
        if name != checkpoint.MANIFEST:
            assert found.step == 2
    finally:
        path.write_bytes(content)


def test_the_newest_stay_and_leftovers_go(tmp_path: Path, store: CheckpointStore) -> None:
    for step in (0, 3, 6, 9):
        write_checkpoint(store, step)
    folder = tmp_path / checkpoint.FOLDER
    shutil.copytree(
        folder / "step-0000009", folder / "tmp-step-0000012"
    )  # killed while it was written
    (folder / "tmp-step-0000012" / checkpoint.MANIFEST).unlink()
    assert store.find_newest().step == 9
    write_checkpoint(store, 12)
    store._prune(12, None)
    assert sorted(path.name for path in folder.iterdir()) == ["step-0000009", "step-0000012"]


def test_a_damaged_one_is_replaced_when_its_step_comes_again(
    tmp_path: Path, store: CheckpointStore, capsys: pytest.CaptureFixture
) -> None:
    write_checkpoint(store, 3)
    write_checkpoint(store, 6)
    manifest = tmp_path / checkpoint.FOLDER / "step-0000006" / checkpoint.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"step": 7}))
    assert store.find_newest().step == 3
    assert (
        f"checkpoint {manifest.parent} is damaged and skipped: {checkpoint.MANIFEST}"
        in capsys.readouterr().out
    )
    write_checkpoint(store, 6)
    assert store.find_newest().step == 6


def test_a_damaged_one_does_not_take_the_place_of_a_whole_one(
    tmp_path: Path, store: CheckpointStore
) -> None:
    for step in (3, 6, 9):
        write_checkpoint(store, step)
    folder = tmp_path / checkpoint.FOLDER
    for step in (6, 9):
        (folder / f"step-000000{step}" / checkpoint.METRICS).unlink()
    assert store.find_newest().step == 3
    write_checkpoint(store, 8)  # another checkpoint_every than before
    store._prune(8, None)
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-0000003",
        "step-0000008",
        "step-0000009",
    ]
    write_checkpoint(store, 9)
    store._prune(9, None)
    assert sorted(path.name for path in folder.iterdir()) == ["step-0000008", "step-0000009"]
    assert store.find_newest().step == 9


def test_what_cannot_be_written_is_a_user_error(tmp_path: Path, store: CheckpointStore) -> None:
    (tmp_path / checkpoint.FOLDER).write_text("in the way")
    with pytest.raises(UserError, match="checkpoint of step 3: cannot write"):
        write_checkpoint(store, 3)


def write_scored(store: CheckpointStore, losses: dict[int, float]) -> None:
    """Save a checkpoint of every step in `losses`, whose held-out losses they are."""
    history: list[dict] = []
    for step in range(1, max(losses) + 1):
        history.append({"step": step, "loss": 1.0})
        if step in losses:
            history[-1]["dev"] = {"held_out": {"loss": losses[step]}}
            store._write(step, {"layer.A.trained": torch.full((2, 2), float(step))}, FACTS, history)
            store._prune(step, store.find_best_step(history))


def list_steps(store: CheckpointStore) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in store.folder.iterdir())


def test_the_best_stays_with_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1, "held_out")
    write_scored(store, {2: 0.5, 4: 0.3, 6: 0.4, 8: 0.3, 10: 0.6})
    assert list_steps(store) == [4, 10]
    assert store.find_newest().step == 10
    assert store.read_best(4).step == 4


def test_without_its_best_a_checkpoint_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(tmp_path, 3, "held_out")
    write_scored(store, {2: 0.5, 4: 0.3, 6: 0.4})
    (store.folder / "step-0000004" / checkpoint.TENSORS).write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"step-0000004, the best by held_out, is damaged"):
        store.read_best(4)
    assert store.find_newest().step == 2
    assert (
        "step-0000006 is skipped: that of step 4, the best by held_out" in capsys.readouterr().out
    )
    assert CheckpointStore(tmp_path, 3).find_newest().step == 6


def test_a_run_that_diverges_names_the_checkpoint_of_its_best_step(tmp_path: Path) -> None:
    def fail(keep_best: str | None) -> str:
        history = [
            {"step": 1, "dev": {"held_out": {"loss": 2.0}}},
            {"step": 2, "dev": {"held_out": {"loss": 3.0}}},
        ]

        def train() -> Iterator[Metrics]:
            yield from history
            raise DivergedError("step 3: loss nan: not finite")

        store, done = CheckpointStore(tmp_path, 2, keep_best), []
        with pytest.raises(DivergedError) as caught:
            for metrics in name_best_step(train(), store, done):
                done.append(metrics)
        assert done == history
        return str(caught.value)

    assert fail(None) == fail("other_text") == "step 3: loss nan: not finite"
    path = tmp_path / checkpoint.FOLDER / "step-0000001"
    expected = f"step 3: loss nan: not finite; step 1, the best by held_out, stays in {path}, but "
    assert fail("held_out").startswith(expected)
