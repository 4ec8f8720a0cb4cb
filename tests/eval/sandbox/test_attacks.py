"""Programs that leave the box, forge a pass or do not end: none passes, and none leaves anything.

Needs Linux with bubblewrap or user namespaces; kinds of box that this machine lacks are skipped.
About a minute on two processors.
"""

import os
import socket
import time
from pathlib import Path

import pytest

from eval.sandbox.box import PYTHON_FLAGS, UNPROTECTED, Box, get_interpreter
from eval.sandbox.check import Verdict
from eval.sandbox.watch import WALL
from tests.support.attacks import ATTACKS, ESCAPES, FORGED
from tests.support.sandbox import check

pytestmark = pytest.mark.xdist_group("sandbox")  # they look for processes that stayed behind

# Places that no program may write to.
OUTSIDE = ("/", "/usr", "/var/tmp", "/tmp", "/etc", "/dev/shm")


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(
    name: str, box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_left: None
) -> None:
    word = f"secret{os.getpid()}{time.monotonic_ns()}"
    monkeypatch.setenv("ASTRA_TEST_SECRET", word)
    witness = tmp_path / "witness.txt"
    witness.write_text("intact")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind(f"\0{word}")
        abstract.listen()
        text = ATTACKS[name]
        for what, value in {
            "WORD": word,
            "WITNESS": witness,
            "FOLDER": tmp_path,
            "TESTS": __file__,
            "PORT": server.getsockname()[1],
            "CALLER": os.getpid(),
        }.items():
            text = text.replace(what, str(value))
        began = time.monotonic()
        verdict = check(text, "assert f(2) == 4", "f", box, timeout=1)
        took = time.monotonic() - began
    print(verdict.reason)
    assert not verdict.passed and verdict.reason and verdict.isolation == box.level
    assert took < WALL + 5  # a busy machine may take its time
    assert "\n" not in verdict.reason and len(verdict.reason) <= 200
    assert [path.name for path in tmp_path.iterdir()] == ["witness.txt"]
    assert witness.read_text() == "intact"
    assert not any(os.path.exists(f"{place}/{word}") for place in OUTSIDE)


@pytest.mark.parametrize(
    "name",
    ["a file of ours", "others' command lines", "a server on this machine", "an abstract socket"],
)
def test_the_attacks_work_where_nothing_isolates(name: str, tmp_path: Path) -> None:
    """A control: these four pass without a box, so it is the box that stops them."""
    unprotected = Box(UNPROTECTED, [get_interpreter(), *PYTHON_FLAGS])
    witness = tmp_path / "witness.txt"
    witness.write_text("intact")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind(f"\0{tmp_path}")
        abstract.listen()
        text = ESCAPES[name].replace("WITNESS", str(witness))
        text = text.replace("PORT", str(server.getsockname()[1])).replace("WORD", str(tmp_path))
        verdict = check(text, "assert f(2) == 4", "f", unprotected)
    assert verdict == Verdict(True, "passed", "none")


@pytest.mark.parametrize(
    "name",
    [name for name in FORGED if not name.startswith("an always equal") and "says" not in name],
)
def test_forged_in_the_box(any_box: None, name: str, nothing_left: None) -> None:
    """With the tests beside it a program can still claim equality, but not with these."""
    verdict = check(FORGED[name], "assert f(2) == 4", "f", timeout=1, in_box=True)
    print(verdict.reason)
    assert not verdict.passed
