"""Prove that a split has all its rows and no others, or is refused: slices, configurations, shards.

Folders of save_to_disk, and of the hub's layout with and without README.md. Needs nothing; 5 s.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import pytest
from huggingface_hub import snapshot_download

from launch.config.schema import Data
from launch.data.hub_layout import list_data_files
from launch.data.manifest import require_same_origin
from launch.data.readers import READERS
from launch.data.rows import (
    fetch_source,
    identify_source,
    limit_identity,
    load_split,
    select_rows,
)
from launch.runtime.errors import UserError
from tests.support.hub import COMMIT, serve_hub
from tests.support.rows import write_lines


def make_rows(count: int, tag: str = "") -> list[dict[str, str]]:
    return [{"query": f"q{i}", "response": f"{tag}{i}"} for i in range(count)]


def read(path: Path, **fields: object) -> list[str]:
    """Return the answers that a recipe's `data` section selects."""
    data = Data(path=str(path), **fields)
    split = load_split(data, fetch_source(data))
    return [row.answer for chunk in select_rows(split, data) for row in chunk.rows]


def refuse(path: Path, message: str, **fields: object) -> None:
    with pytest.raises(UserError, match=message) as error:
        read(path, **fields)
    assert str(error.value).startswith("data.path: ")


def write_readme(folder: Path, header: str) -> None:
    (folder / "README.md").write_text(f"---\n{header}\n---\n# Rows\n", encoding="utf-8")


def write_file(folder: Path) -> Path:
    return write_lines(folder / "rows.jsonl", make_rows(50))


def write_hub_folder(folder: Path) -> Path:
    write_lines(folder / "data" / "train-00000-of-00002.jsonl", make_rows(50)[:20])
    write_lines(folder / "data" / "train-00001-of-00002.jsonl", make_rows(50)[20:])
    return folder


def save_to_disk(folder: Path) -> Path:
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(make_rows(50)).save_to_disk(folder, num_shards=3)
    return folder


@pytest.mark.parametrize("write", [write_file, write_hub_folder, save_to_disk])
def test_slices_are_those_of_datasets(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path / "rows")
    whole = datasets.Dataset.from_list(make_rows(50))
    for spec in (
        *("train", "train[:10]", "train[10%:]", "train[-5:]", "train[:33%]", "train[5:7]"),
        *("train[40:]+train[:3]", "train[:1000]", "train[25%:75%]"),
    ):
        cut = []
        for part in datasets.ReadInstruction.from_spec(spec).to_absolute({"train": 50}):
            cut += whole["response"][part.from_ : part.to]
        assert read(path, split=spec) == cut, spec
    assert len(read(path, split="train[10%:]")) == 45
    for spec in ("test", "trian[:5]", "train+test", "all"):
        refuse(path, "has no split '(test|trian|all)'", split=spec)
    for spec in ("train[", "train[a:b]", "train[1:2:3]", "train[:10%](up)", "train train"):
        refuse(path, "cannot be read|has no split", split=spec)
    refuse(path, "has no configuration 'nosuch'.* set data.config to null", config="nosuch")


def test_a_saved_folder_has_its_splits_whole(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list(make_rows(9))
    splits = datasets.DatasetDict(
        train=rows.select([4, 2]), test=rows.with_format("numpy", ["query"])
    )
    splits.save_to_disk(tmp_path / "dict [1]")
    assert read(tmp_path / "dict [1]") == ["4", "2"]
    assert read(tmp_path / "dict [1]", split="test[7:]+train") == ["7", "8", "4", "2"]
    assert read(tmp_path / "dict [1]" / "test") == [str(i) for i in range(9)]
    refuse(tmp_path / "dict [1]", "no split 'dev'; set data.split to train or test", split="dev")
    rows.save_to_disk(tmp_path / "shards", num_shards=3)
    (tmp_path / "shards" / "data-00001-of-00003.arrow").unlink()
    refuse(tmp_path / "shards", r"lacks its file data-00001-of-00003\.arrow")
    state = tmp_path / "shards" / "state.json"
    known = json.loads(state.read_text())
    state.write_text(json.dumps(known | {"_data_files": known["_data_files"][::2]}))
    refuse(tmp_path / "shards", "2 of the 3 shards")
    state.write_text("{")
    refuse(tmp_path / "shards", r"state\.json cannot be read")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["data/train-00000-of-00003.parquet"], "1 of the 3 shards"),
        (["train-00001-of-00003.jsonl", "train-00002-of-00003.jsonl"], "2 of the 3"),
        (["train_0_of_2.json.gz"], "1 of the 2"),
        (["a/part-1-of-2.csv"], "1 of the 2"),
        (["x-00000-of-00002-0a1b.jsonl", "x-00000-of-00002-2c3d.jsonl"], "one is there twice"),
        (["x-0-of-1.jsonl", "x-0-of-2.jsonl", "x-1-of-2.jsonl"], "1 and 2 files lie together"),
        (["train-00000-of-00001.jsonl", "train-00000-of-00004.jsonl"], "lie together"),
    ],
)
def test_missing_shards_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    _write_files(tmp_path / "rows", names)
    refuse(tmp_path / "rows", message)


@pytest.mark.parametrize(
    "names",
    [
        ["data/train-00000-of-00002-0a.parquet", "data/train-00001-of-00002-1b.parquet"],
        ["part-1-of-2.jsonl", "part-2-of-2.jsonl"],  # from 1
        ["train-00000-of-00001.jsonl", "test-00000-of-00005.jsonl"],  # another split is cut
        ["train-9-of-10th.jsonl"],
    ],
)
def test_whole_shards_are_read(names: list[str], tmp_path: Path) -> None:
    _write_files(tmp_path / "rows", names)
    assert len(read(tmp_path / "rows")) == 3 * sum("test" not in name for name in names)


def test_a_shard_that_is_named_alone_is_a_single_file(tmp_path: Path) -> None:
    _write_files(tmp_path, ["train-00000-of-00003.parquet"])
    assert len(read(tmp_path / "train-00000-of-00003.parquet")) == 3


def _write_files(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = datasets.Dataset.from_list(make_rows(3))
        if name.endswith(".parquet"):
            rows.to_parquet(path)
        elif name.endswith(".csv"):
            rows.to_csv(path)
        else:
            rows.to_json(path, compression="infer")


def test_files_around_change_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", make_rows(3))
    for name in ("LICENSE", "test_notes.txt", "instruction.md", "task.toml", "x.eval", "train.py"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".hidden.jsonl").write_text("x")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert read(tmp_path) == ["0", "1", "2"]
    write_lines(tmp_path / "b.json", make_rows(2, "b"))  # lines in .json are taken too
    assert read(tmp_path) == ["0", "1", "2", "b0", "b1"]
    (tmp_path / "c.csv").write_text("query,response\nq,c\n")
    refuse(tmp_path, r"several formats \(a\.jsonl, c\.csv\)")
    (tmp_path / "c.csv").unlink()
    for name in ("c.tsv", "c.jsonl.zst", "c.zip", "c.arrow"):
        (tmp_path / name).write_bytes(b"x")
        refuse(tmp_path, rf"{name} is among the files of split train, and is none of")
        (tmp_path / name).unlink()
    (tmp_path / "c.jsonl").write_text("")
    refuse(tmp_path, r"c\.jsonl is empty")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, "doesn't contain any data files")
    (tmp_path / "notes.txt").write_text("x")
    refuse(tmp_path, "doesn't contain any data files")


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    write_lines(tmp_path / "real" / "train-1.jsonl", make_rows(2))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "data").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real")
    assert read(tmp_path / "rows") == ["0", "1"]
    assert list(list_data_files(tmp_path / "rows")) == ["data/train-1.jsonl"]


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", make_rows(2))
    (tmp_path / "LICENSE").symlink_to(tmp_path / "gone")  # holds no rows
    assert read(tmp_path) == ["0", "1"]
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    refuse(tmp_path, r"b\.jsonl is a link to a file that is missing")
    with pytest.raises(UserError, match="is a link to a file that is missing"):
        identify_source(Data(path=str(tmp_path)), tmp_path)


@pytest.mark.parametrize(
    ("header", "answers"),
    [
        ("license: mit", ["a0", "b0", "c0"]),
        ("configs: [{config_name: x, data_files: b.jsonl}]", ["b0"]),
        ("configs: [{config_name: x, data_files: [b.jsonl, a*]}]", ["b0", "a0"]),
        ("configs: [{config_name: x, data_files: [a.jsonl, 'a*']}]", ["a0"]),  # not twice
        ("configs: [{config_name: x, data_dir: sub}]", ["c0"]),
        (
            "configs: [{config_name: x, data_files: a.jsonl}, "
            "{config_name: y, data_files: gone.jsonl}, "
            "{config_name: z, default: true, data_files: [{split: train, path: b.jsonl}]}]",
            ["b0"],
        ),
        (
            "dataset_info: {splits: [{name: train, num_examples: 3, num_bytes: 1}]}",
            ["a0", "b0", "c0"],
        ),
    ],
)
def test_readme_is_honoured(header: str, answers: list[str], tmp_path: Path) -> None:
    _write_hub_files(tmp_path)
    write_readme(tmp_path, header)
    assert sorted(read(tmp_path)) == sorted(answers)
    shutil.copytree(tmp_path, tmp_path / "again [v2]", ignore=shutil.ignore_patterns("again*"))
    assert sorted(read(tmp_path / "again [v2]")) == sorted(answers)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            "configs: [{config_name: x, data_files: a.jsonl, sep: ';'}]",
            "sets sep for configuration x",
        ),
        ("configs: [{config_name: x, data_files: a.jsonl, features: []}]", "sets features"),
        ("configs: [{config_name: x, data_files: gone.jsonl}]", r"gone\.jsonl"),
        ("configs: [{config_name: x, data_files: 'gone*'}]", "not in the folder"),
        ("configs: [{config_name: x, data_files: ../a.jsonl}]", "a.jsonl"),
        ("configs: [{config_name: x, data_files: 'https://x.org/a.jsonl'}]", "not in the folder"),
        (
            "configs: [{config_name: x, data_files: [{split: dev, path: a.jsonl}]}]",
            "no split 'train'",
        ),
        (
            "configs: [{config_name: x}, {config_name: x, data_files: a.jsonl}]",
            "two configurations",
        ),
        (
            "configs: [{config_name: x, data_files: a.jsonl}, {config_name: y, data_files: b.jsonl}]",
            "Config name is missing; set data.config to x or y",
        ),
        ("configs: nonsense", "to be a list"),
        ("configs: [", "not YAML"),
        ("- [", "not YAML"),
        ("configs: [5]", "cannot load"),
        ("configs: [{config_name: [1]}]", "cannot load"),
        ("configs: [{config_name: x, data_dir: 5}]", "cannot load"),
        ("configs: [{config_name: x, data_files: [{split: train, path: [5]}]}]", "cannot load"),
        ("dataset_info: {splits: 5}", "cannot load"),
        ("dataset_info: {splits: [{name: train, num_examples: 9, num_bytes: 1}]}", "says 9"),
        ("---\nconfigs: [", "header of README.md is"),
    ],
)
def test_a_readme_that_is_not_understood_is_refused(
    header: str, message: str, tmp_path: Path
) -> None:
    _write_hub_files(tmp_path / "rows")
    write_readme(tmp_path / "rows", header)
    refuse(tmp_path / "rows", message)


def _write_hub_files(folder: Path) -> None:
    write_lines(folder / "a.jsonl", make_rows(1, "a"))
    write_lines(folder / "b.jsonl", make_rows(1, "b"))
    write_lines(folder / "sub" / "c.jsonl", make_rows(1, "c"))


def test_a_part_of_a_snapshot_in_the_hubs_cache_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789" * 4
    cached = tmp_path / "hub" / "datasets--someone--sums"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    _write_files(cached / "snapshots" / commit, ["data/train-00000-of-00003.parquet"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot load someone/sums .*1 of the 3 shards"):
        read(Path("someone/sums"))


@pytest.fixture
def sent(tmp_path: Path) -> Iterator[list[str]]:
    """Serve a hub from the folder `remote`, and return the names of the files that are fetched."""
    with serve_hub(tmp_path / "remote", tmp_path / "hub") as names:
        yield names


@pytest.fixture
def hub(tmp_path: Path, sent: list[str]) -> Path:
    """Return the folder of the data set someone/sums on that hub."""
    folder = tmp_path / "remote" / "datasets" / "someone" / "sums"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    "name", ["train-b.jsonl.zst", "train-b.TSV", "train-b.arrow", "train-b.parquet.gz"]
)
def test_a_file_that_is_refused_in_a_folder_is_refused_from_the_hub(
    name: str, hub: Path, sent: list[str]
) -> None:
    write_lines(hub / "train-a.jsonl", make_rows(2))
    (hub / name).write_text("much")
    message = f"{Path(name).name} is among the files of split train"
    refuse(hub, message)
    refuse(Path("someone/sums"), message)
    assert Path(name).name not in sent


def test_endings_are_fetched_in_any_case_and_other_files_change_nothing(
    hub: Path, sent: list[str]
) -> None:
    write_lines(hub / "train-a.jsonl", make_rows(1))
    write_lines(hub / "train-b.JSONL", make_rows(2))
    (hub / "images.zip").write_text("much")  # of no split
    (hub / ".hidden").mkdir()
    (hub / ".hidden" / "train-c.zst").write_text("much")
    assert read(Path("someone/sums")) == read(hub) == ["0", "0", "1"]
    assert "images.zip" not in sent


def test_only_the_files_of_the_split_are_fetched(hub: Path, sent: list[str]) -> None:
    write_lines(hub / "en" / "train.jsonl", make_rows(2))
    write_lines(hub / "en" / "validation.jsonl", make_rows(1))
    write_lines(hub / "de" / "train[1].jsonl", make_rows(3))
    write_readme(
        hub,
        """
configs:
- config_name: en
  data_files: [{split: train, path: en/train.jsonl}, {split: validation, path: en/validation.jsonl}]
- config_name: de
  data_files: [{split: train, path: "de/*"}]
""",
    )

    english = Data(path="someone/sums", config="en")
    folder = fetch_source(english)
    assert sent == ["README.md", "en/train.jsonl"]
    before = identify_source(english, folder)
    assert before == {"commit": COMMIT, "split_files": ["en/train.jsonl"]}
    german = Data(path="someone/sums", config="de")
    split = load_split(german, fetch_source(german))
    assert split.count_rows() == 3
    assert sent[2:] == ["de/train[1].jsonl"]
    # What else has been fetched since is no difference: the tokens need not be made again.
    assert identify_source(english, folder) == before
    with pytest.raises(UserError, match=r"cannot load someone/sums .*set data\.config to en or de"):
        fetch_source(Data(path="someone/sums"))
    sent.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert load_split(english, fetch_source(english)).count_rows() == 2
        with pytest.raises(
            UserError, match=r"its cache lacks files of someone/sums .*; check the name, start once"
        ):
            fetch_source(Data(path="someone/sums", config="en", split="validation"))
    assert not sent


def test_what_an_earlier_version_fetched_is_enough_offline(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(hub / "train.jsonl", make_rows(2))
    for name in ("README.md", ".gitattributes", "notes.txt"):
        (hub / name).touch()
    snapshot_download("someone/sums", repo_type="dataset", allow_patterns=["*.jsonl", "README.md"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert read(Path("someone/sums")) == ["0", "1"]


def test_without_room_for_the_names_all_rows_are_fetched(
    hub: Path, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(hub / "train-a.jsonl", make_rows(2))
    write_lines(hub / "other.jsonl", make_rows(1))
    monkeypatch.setattr("huggingface_hub._snapshot_download.write_tree_cache", lambda *_: None)
    assert read(Path("someone/sums")) == ["0", "1"]
    assert sorted(sent) == ["other.jsonl", "train-a.jsonl"]


def test_a_data_set_that_is_not_there_or_gated_is_named(hub: Path) -> None:
    with pytest.raises(
        UserError, match=r"^data\.path: cannot get someone/absent .*\(RepositoryNot"
    ):
        fetch_source(Data(path="someone/absent"))
    (hub / "gated").touch()
    with pytest.raises(UserError, match=r"^data\.path: cannot get someone/sums .*log in .*\(Gated"):
        fetch_source(Data(path="someone/sums"))


def test_a_yaml_file_beside_readme_is_refused_from_the_hub_too(hub: Path) -> None:
    write_lines(hub / "train.jsonl", make_rows(1))
    (hub / ".huggingface.yaml").write_text("")
    refuse(hub, r"\.huggingface\.yaml is not supported")
    refuse(Path("someone/sums"), r"\.huggingface\.yaml is not supported")


def test_what_was_listed_on_the_hub_is_refused_offline(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(hub / "train-a.jsonl", make_rows(2))
    (hub / "train-b.jsonl.zst").write_text("much")
    fetch_source(Data(path="someone/sums"))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuse(Path("someone/sums"), "train-b.jsonl.zst is among the files of split train")


@pytest.mark.parametrize(
    "name", [*(f"rows{ending}" for ending in READERS), "rows.JSONL", "folder/rows.csv.gz"]
)
def test_a_missing_file_is_not_taken_for_a_hub_id(name: str, hub: Path) -> None:
    with pytest.raises(UserError, match=f"^data.path: no file or folder {name};"):
        fetch_source(Data(path=name))


def test_a_file_is_known_by_what_no_tool_sets_back(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", make_rows(5))
    data = Data(path=str(path))
    before, status = identify_source(data, path), path.stat()
    path.write_text(path.read_text().replace("q0", "q9"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert identify_source(data, path) != before


def test_what_an_earlier_version_did_not_record_is_not_compared() -> None:
    now = {"files": {"a": [1, 2, 3, 4]}}
    assert limit_identity(now, {"files": {"a": [1, 2]}}) == {"files": {"a": [1, 2]}}
    assert limit_identity(now, now) == now
    assert limit_identity(now, {"commit": COMMIT}) == now
    now = {"commit": COMMIT, "files": ["a"]}
    assert limit_identity(now, {"commit": COMMIT}) == {"commit": COMMIT}
    assert limit_identity(now, {"commit": COMMIT, "files": []}) == now
    now = {"commit": COMMIT, "split_files": ["a"]}
    assert limit_identity(now, {"commit": COMMIT}) == {"commit": COMMIT}
    every = {"commit": COMMIT, "files": ["README.md", "a", "of another split"]}
    assert limit_identity(now, every) == every
    for other in (
        {"commit": COMMIT, "files": ["b"]},
        {"commit": COMMIT, "split_files": ["a", "b"]},
    ):
        assert limit_identity(now, other) == now


def test_rows_of_a_mix_that_an_earlier_version_fetched_are_the_same(tmp_path: Path) -> None:
    found = {"commit": COMMIT, "files": ["README.md", "a"], "tokens_sha256": "1"}
    manifest = {"made_from": {"source.sums": found}}
    wanted = {"commit": COMMIT, "split_files": ["a"], "tokens_sha256": "1"}
    require_same_origin(tmp_path, manifest, {"source.sums": wanted}, "--output")
    with pytest.raises(UserError, match="was made with another source"):
        require_same_origin(
            tmp_path, manifest, {"source.sums": wanted | {"tokens_sha256": "2"}}, "--output"
        )
