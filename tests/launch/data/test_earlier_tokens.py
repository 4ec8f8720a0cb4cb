"""Prove that tokens of earlier versions are taken where their reading cannot have changed a row.

An earlier version's folder is today's, without what its manifest did not have. Needs nothing; 2 s.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.config.schema import Data
from launch.data.token_cache import make_tokens, obtain_tokens
from launch.runtime.errors import UserError
from tests.support.rows import make_byte_tokenizer, write_lines

ROWS = [{"query": f"q{i}", "response": f"a{i}"} for i in range(5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_byte_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def make_earlier(folder: Path, data: Data, model: Path, source: Path) -> dict:
    """Make tokens in `folder` and take from the manifest what an earlier version did not write."""
    make_tokens(folder, data, model, source)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["made_from"]["reading"], manifest["special"], manifest["files_read"]
    path.write_text(json.dumps(manifest))
    return manifest


def test_tokens_of_an_earlier_version_are_taken(model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", ROWS)
    data = Data(path=str(source))
    manifest = make_earlier(tmp_path / "made", data, model, source)
    wanted = data.model_copy(update={"prepared": str(tmp_path / "made")})
    found = obtain_tokens(wanted, model)
    assert found.manifest == manifest
    assert found.open_tokens().num_special == 0
    assert make_tokens(tmp_path / "made", data, model, source, verify=True).manifest == manifest
    with pytest.raises(UserError, match=r"another data\.max_length"):
        obtain_tokens(wanted.model_copy(update={"max_length": 100}), model)


def spell_special(manifest: dict, folder: Path) -> None:
    """Put the end-of-sequence token in the middle of an example."""
    content = bytearray((folder / "tokens.bin").read_bytes())
    content[20:24] = bytes(4)
    (folder / "tokens.bin").write_bytes(content)


def rename_source(*names: str) -> Callable[[dict, Path], None]:
    def rename(manifest: dict, folder: Path) -> None:
        manifest["source_sha256"] = dict.fromkeys(names, "")

    return rename


def set_field(field: str, value: str) -> Callable[[dict, Path], None]:
    def set_value(manifest: dict, folder: Path) -> None:
        manifest["made_from"]["data"][field] = value

    return set_value


def drop_rows(manifest: dict, folder: Path) -> None:
    manifest["dropped"] = {"not text": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spell_special, "spells special tokens"),
        (set_field("split", "train[:10]"), r"did not look at data\.split"),
        (set_field("config", "x"), r"did not look at data\.split"),
        (set_field("path", "runs [v2]/rows.jsonl"), r"took data\.path for a pattern"),
        (rename_source("a.jsonl", "b.json"), "guessed the types"),
        (rename_source("a.csv"), "guessed the types"),
        (rename_source("data/train-00000-of-00003.parquet"), "missing shards"),
        (drop_rows, "dropped rows as not text"),
    ],
)
def test_what_an_earlier_version_may_have_changed_is_refused(
    change: Callable[[dict, Path], None], message: str, model: Path, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "rows.jsonl", ROWS)
    data = Data(path=str(source))
    folder = tmp_path / "made"
    manifest = make_earlier(folder, data, model, source)
    source.unlink()
    change(manifest, folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    fields = {**manifest["made_from"]["data"], "prepared": str(folder)}
    wanted = Data(**{("filter" if name == "keep" else name): fields[name] for name in fields})
    with pytest.raises(UserError, match=rf"data\.prepared: .* earlier version, .*{message}"):
        obtain_tokens(wanted, model)


def test_with_the_rows_at_hand_the_tokens_decide(model: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows" / "train-a.jsonl", ROWS)
    source = write_lines(tmp_path / "rows" / "train-b.jsonl", ROWS).parent
    data = Data(path=str(source))
    folder = tmp_path / "made"
    manifest = make_earlier(folder, data, model, source)
    wanted = data.model_copy(update={"prepared": str(folder)})
    assert obtain_tokens(wanted, model).manifest == manifest  # two files of JSON, but no change
    write_lines(source / "train-b.jsonl", [{"query": "q", "response": "2024-05-01"}])
    with pytest.raises(UserError, match="guessed the types"):
        obtain_tokens(wanted, model)


def test_what_an_earlier_version_did_not_finish_is_not_resumed(model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", ROWS)
    data = Data(path=str(source))
    manifest = make_earlier(tmp_path / "made", data, model, source)
    (tmp_path / "made" / "manifest.json").unlink()
    (tmp_path / "made" / "progress.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"--output: .* made with another reading"):
        make_tokens(tmp_path / "made", data, model, source)
