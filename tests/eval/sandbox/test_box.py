"""The box is chosen once: the best that works here, or none only where the caller allows it.

Needs Linux; bubblewrap or user namespaces for the test of the choice. A few seconds.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from eval.errors import EvalError
from eval.sandbox import box as box_module
from eval.sandbox.box import Box, choose_box
from eval.sandbox.check import Verdict
from eval.sandbox.enter import list_mounts
from tests.support.sandbox import BOXES, check

pytestmark = pytest.mark.xdist_group("sandbox")  # they look for processes that stayed behind


@pytest.fixture
def no_box_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without bubblewrap and user namespaces, on which none has been tried yet."""
    monkeypatch.setattr(box_module, "LEVELS", ())
    monkeypatch.setattr(box_module, "_find_best_box", box_module._find_best_box.__wrapped__)


def test_no_isolation_is_refused_unless_allowed(no_box_works: None) -> None:
    with pytest.raises(
        EvalError, match=r"apt-get install bubblewrap.*or run them unprotected"
    ) as error:
        check("def f(x): return 4", "assert f(2) == 4", "f")
    assert error.value.subject == "sandbox"
    with pytest.raises(EvalError, match="no sandbox"):
        choose_box()
    box = choose_box(allow_unsandboxed=True)
    wrong = check("def f(x): return 3", "assert f(2) == 4", "f", box)
    assert wrong == Verdict(False, "wrong answer: assert f(2) == 4", "none")
    late = check("while True: pass", "assert f(2) == 4", "f", box, timeout=0.5)
    assert late == Verdict(False, "timed out after 0.5 s", "none")


@pytest.mark.parametrize(
    ("level", "command"),
    [
        ("bubblewrap", "bwrap --unshare-all --disable-userns --unshare-user --ro-bind / / true"),
        ("namespaces", "unshare --user --map-root-user --mount --pid --net --ipc --fork true"),
    ],
)
def test_a_box_works_where_the_machine_has_what_it_is_made_of(level: str, command: str) -> None:
    """Other tests skip a kind of box that does not work: a fault of ours must not be the reason."""
    words = command.split()
    if shutil.which(words[0]) is None or subprocess.run(words, capture_output=True).returncode != 0:
        pytest.skip(f"this machine cannot run: {command}")
    assert level in BOXES


def test_the_best_box_is_found_once(any_box: None, monkeypatch: pytest.MonkeyPatch) -> None:
    best = next(iter(BOXES))
    assert choose_box().level == best
    monkeypatch.setattr(box_module, "find_box", None)  # to try again would be a TypeError
    assert choose_box().level == best


def test_a_box_that_breaks_is_no_wrong_answer() -> None:
    broken = Box("bubblewrap", ["sh", "-c", "echo no space >&2; exit 1"])
    with pytest.raises(EvalError, match="did not start: no space"):
        check("def f(x): return 4", "assert f(2) == 4", "f", broken)


def test_a_table_of_mounts(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "94 93 254:0 /usr /usr rw,nosuid,relatime - ext4 /dev/vda rw\n"
        "95 94 0:42 / /usr/a\\040b\\134c\\011\u00e9 ro,noexec shared:3 - tmpfs tmpfs rw\n"
    )
    mounts = list_mounts(str(table))
    assert mounts[0] == ("/usr", {"rw", "nosuid", "relatime"})
    assert mounts[1] == ("/usr/a b\\c\t\u00e9", {"ro", "noexec"})
