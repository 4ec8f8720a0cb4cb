"""A model is fetched from a hub over HTTP: only the files that are read, and what fails is named.

Needs nothing. Takes 3 s.
"""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.models.files import fetch_model, find_commit, hash_weights
from launch.models.identity import hash_tokenizer
from launch.runtime import watchdog
from launch.runtime.errors import UserError
from tests.support.hub import COMMIT, serve_hub

TOKENIZER = {"tokenizer.model.v3", "vocab.txt", "additional_chat_templates/tools.jinja"}
WEIGHTS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
# Other programs' copies, and what nobody reads.
OTHERS = {
    "consolidated.safetensors",
    "original/a.safetensors",
    "original/params.json",
    "original/tokenizer.model",
    "pytorch_model.bin",
    "LICENSE.txt",
    "README.md",
}
NAME = "someone/model"


@pytest.fixture
def sent(tmp_path: Path) -> Iterator[list[str]]:
    """Serve a hub with one model, and return the names of the files that are fetched."""
    folder = tmp_path / "remote" / "models" / NAME
    for name in {"config.json"} | TOKENIZER | WEIGHTS | OTHERS:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"of {name}")
    with serve_hub(tmp_path / "remote", tmp_path / "hub") as names:
        yield names


def test_the_files_that_are_read_are_fetched_once(
    tmp_path: Path, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = []
    monkeypatch.setattr(watchdog, "heartbeat", lambda *_: beats.append(None))
    folder = fetch_model(NAME, "main", weights=False)
    assert set(sent) == {"config.json"} | TOKENIZER
    assert len(beats) > len(sent)  # bytes count too: a large file is no run that has stalled
    assert fetch_model(NAME, "main") == folder
    assert set(sent) == {"config.json"} | TOKENIZER | WEIGHTS
    assert len(sent) == len(set(sent))
    assert find_commit(folder) == COMMIT
    # A local copy is the same model.
    copy = tmp_path / "remote" / "models" / NAME
    assert hash_tokenizer(folder, with_config=True) == hash_tokenizer(copy, with_config=True)
    hashes = [hash_weights(one / name for name in WEIGHTS) for one in (folder, copy)]
    assert hashes[0] == hashes[1]

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch_model(NAME, "main") == folder


def test_what_cannot_be_fetched_is_named(
    tmp_path: Path, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UserError, match=r"^model\.name: cannot get someone/absent \(revision main\)"
    ):
        fetch_model("someone/absent", "main")
    fetch_model(NAME, "main", weights=False)
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(
            UserError, match=r"its cache lacks files of someone/model .*once with a"
        ):
            fetch_model(NAME, "main")
    (tmp_path / "remote" / "models" / NAME / "gated").touch()
    with pytest.raises(UserError, match=r"^--model: cannot get someone/model .*log in .*\(Gated"):
        fetch_model(NAME, "other", field="--model")
    assert not WEIGHTS & set(sent)


@pytest.mark.usefixtures("sent")
def test_a_full_disk_is_no_wrong_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fill)
    with pytest.raises(OSError, match="No space left"):  # launch.runtime.entry has a line for it
        fetch_model(NAME, "main")
