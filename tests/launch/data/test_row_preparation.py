"""launch/prepare.py on rows with labels: what it makes is what a run would, without the rows. 4 s."""

from pathlib import Path

import pytest
import torch

from launch.config.schema import Data
from launch.data.preparation import prepare_tokens
from launch.data.task_rows import RowFolder, locate_dev, prepare_rows
from launch.runtime.errors import UserError
from tests.support.classifiers import load_recipe, make_recipe, make_rows, write_rows


def assert_same_rows(found: RowFolder, wanted: RowFolder) -> None:
    """Check that two folders hold the same tokens and labels."""
    for name, value in vars(wanted.open_tokens()).items():
        other = getattr(found.open_tokens(), name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value


@pytest.mark.parametrize("kind", ["bert", "regression"])
def test_a_run_takes_prepared_rows_without_their_files(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASTRA_CACHE", str(tmp_path / "cache"))
    path = make_recipe(tmp_path, "bert", regression=kind == "regression")
    dev = f"{tmp_path}/dev.jsonl"
    settings = [f"task.dev={{a: {dev}, 'b/c': {dev}}}", "data.limit=50"]
    recipe = load_recipe(path, *settings)
    base, prepared = tmp_path / "base", tmp_path / "prepared"
    checked, rows, dev_rows = prepare_rows(recipe, base)
    (base / "model.safetensors").rename(tmp_path / "weights")  # which are not needed
    prepare_tokens(recipe, prepared, [])
    (tmp_path / "weights").rename(base / "model.safetensors")
    report = (prepared / "report.md").read_text()
    assert report in capsys.readouterr().out
    assert "| kept | 50 |" in report and "Development rows of b/c:" in report
    assert f"| of them, truncated to 16 tokens | {rows.manifest['cut']} |" in report
    labels = rows.open_tokens().labels
    shown = f"| of them, labelled maybe | {int((labels == 1).sum())} |"
    if kind == "regression":
        shown = f"| labels | {labels.min().item():g} to {labels.max().item():g} |"
    assert shown in report
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).rename(tmp_path / f"gone-{name}")
    again = load_recipe(path, *settings, f"data.prepared={prepared}")
    found, rows_again, dev_again = prepare_rows(again, base)
    assert found == checked and dev_again.keys() == dev_rows.keys() == {"a", "b/c"}
    for one, other in zip(
        (rows_again, *dev_again.values()), (rows, *dev_rows.values()), strict=True
    ):
        assert_same_rows(one, other)
        assert one.folder.is_relative_to(prepared) and other.folder.is_relative_to(
            tmp_path / "cache"
        )


def test_a_regression_on_a_split_without_labels_is_refused(tmp_path: Path) -> None:
    """The hub's test split of STS-B has -1 in every row."""
    path = make_recipe(tmp_path, "bert", regression=True)
    write_rows(tmp_path / "train.jsonl", [row | {"label": -1.0} for row in make_rows(60, 1, True)])
    with pytest.raises(UserError, match=r"^data\.split: the label of every row is -1,"):
        prepare_rows(load_recipe(path), tmp_path / "base")


def test_a_split_is_not_taken_for_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("validation").mkdir()
    Path("dev.jsonl").touch()
    data = Data(path="train.jsonl")
    assert locate_dev(data, "mrpc", "validation").path == "train.jsonl"
    assert locate_dev(data, "mrpc", "./validation").path == "./validation"
    assert locate_dev(data, "mrpc", "dev.jsonl").path == "dev.jsonl"


def test_other_rows_than_the_recipes_are_refused(tmp_path: Path) -> None:
    path = make_recipe(tmp_path, "bert")
    base, prepared = tmp_path / "base", tmp_path / "prepared"
    prepare_tokens(load_recipe(path), prepared, [])
    prepare_tokens(load_recipe(path), prepared, [])  # it is finished, and the same
    given = f"data.prepared={prepared}"
    for settings, message in {
        ("data.max_length=12",): r"^data\.prepared: .* another data\.max_length \(16, now 12\)",
        ("task.labels=['no', 'yes', maybe]",): r"^data\.prepared: .* another task\.labels",
        ("task.sentence2=null",): r"^data\.prepared: .* another task\.sentence2",
        (
            "task.dev={other: validation}",
        ): r"^task\.dev: validation: data\.prepared: .*other is not",
    }.items():
        with pytest.raises(UserError, match=message):
            prepare_rows(load_recipe(path, given, *settings), base)
    with pytest.raises(UserError, match=r"^--output: .* made with another data\.max_length"):
        prepare_tokens(load_recipe(path, "data.max_length=12"), prepared, [])
    with pytest.raises(UserError, match=r"^--check-overlap: .* have none; leave it out"):
        prepare_tokens(load_recipe(path), prepared, ["gsm8k"])
    write_rows(tmp_path / "train.jsonl", make_rows(10, 9))
    with pytest.raises(UserError, match=r"^--output: .* made with another source\.files"):
        prepare_tokens(load_recipe(path), prepared, [])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"^--output: .* other files \(notes.txt\)"):
        prepare_tokens(load_recipe(path), tmp_path / "full", [])
    rows = prepared / "rows.safetensors"
    rows.write_bytes(rows.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="damaged"):
        prepare_rows(load_recipe(path, given), base)


def test_bad_rows_are_reported_before_they_are_refused(tmp_path: Path) -> None:
    path = make_recipe(tmp_path, "bert")
    rows = make_rows(21, 2)
    write_rows(tmp_path / "train.jsonl", [*make_rows(9, 1), rows[0] | {"label": "no such label"}])
    with pytest.raises(UserError, match=r"row 10 of .* set data\.on_bad_row=drop"):
        prepare_tokens(load_recipe(path), tmp_path / "prepared", [])
    assert "no such label" in (tmp_path / "prepared" / "report.md").read_text()
    write_rows(tmp_path / "dev.jsonl", [*rows[:5], rows[5] | {"label": "no such label"}])
    dropping = load_recipe(path, "data.on_bad_row=drop")
    with pytest.raises(UserError, match=r"^task\.dev: .* leave them out by data\.filter") as caught:
        prepare_tokens(dropping, tmp_path / "again", [])
    assert "on_bad_row" not in str(caught.value)


def test_labels_that_count_from_1_are_suspected_and_no_row_is_to_be_left_out(
    tmp_path: Path,
) -> None:
    path = make_recipe(tmp_path, "bert")
    rows = [row | {"label": 1 + i % 3} for i, row in enumerate(make_rows(9, 1))]
    write_rows(tmp_path / "train.jsonl", rows)
    wanted = "one of task.labels, no, maybe, yes, nor a place from 0 to 2"
    doubt = rf"field 'label' is 3, which is not {wanted} \(do the rows count from 1\?\); in all 3 "
    remedy = "of 9 rows: mend them, or give task.labels as the numbers that the rows have$"
    with pytest.raises(UserError, match=f"row 3 of .*: {doubt}.*{remedy}"):
        prepare_rows(load_recipe(path), tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", make_rows(9, 1))
    write_rows(tmp_path / "dev.jsonl", rows)
    with pytest.raises(UserError, match=f"^task\\.dev: .*row 3 of .*: {doubt}.*{remedy}"):
        prepare_rows(load_recipe(path), tmp_path / "base")
    write_rows(tmp_path / "dev.jsonl", [*make_rows(9, 1), rows[0] | {"label": 4}])
    with pytest.raises(UserError, match=f"is 4, which is not {wanted}; in all 1 label not in"):
        prepare_rows(load_recipe(path), tmp_path / "base")
    given = load_recipe(path, "task.labels=['1','2','3']", f"task.dev={tmp_path}/train.jsonl")
    write_rows(tmp_path / "train.jsonl", rows)
    _, found, _ = prepare_rows(given, tmp_path / "base")
    assert found.open_tokens().labels.tolist() == [0, 1, 2] * 3
    write_rows(tmp_path / "dev.jsonl", make_rows(9, 1))
    _, found, _ = prepare_rows(load_recipe(path, "data.on_bad_row=drop"), tmp_path / "base")
    told = "3 rows have a label one beyond the places (do the rows count from 1?)"
    assert found.manifest["notes"] == [f"task.labels: {told}"]
    # Where such rows are dropped, another refusal keeps its own remedy.
    short = ("data.on_bad_row=drop", "data.on_cut=refuse", "data.max_length=5")
    with pytest.raises(
        UserError, match=r"^data\.max_length: .*, or set data\.on_cut=keep or drop$"
    ):
        prepare_rows(load_recipe(path, *short), tmp_path / "base")
