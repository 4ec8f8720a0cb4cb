"""The filter of system calls denies each call that it names, and its numbers are the kernel's.

Needs x86-64 Linux. A second.
"""

import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eval.sandbox import seccomp
from tests.support.leaks import CALLS
from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(
    not seccomp.make_filter(), reason="there is a filter for x86-64 only"
)

HEADERS = ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h")
# Calls that work, or fail otherwise, without a filter: of these a test shows what the filter does.
OPEN = ("add_key", "flock", "inotify_init1", "memfd_create", "shmget", "fcntl SETLK", "socket 16")
OPEN += ("prctl PDEATHSIG", "io_uring_setup", "mmap 1")
MISSING = ("clone3", "number", "i386")  # ENOSYS, all others EPERM


def run_calls(filtered: bool, names: tuple[str, ...] = ()) -> dict[str, str]:
    """Return what each call gives to a process without privileges."""
    install = "call('prctl', 38, 1, 0, 0, 0)\ninstall_filter(make_filter())" if filtered else ""
    program = (
        "import json\nfrom eval.sandbox.enter import call, install_filter\n"
        "from eval.sandbox.seccomp import make_filter\n"
        "from eval.sandbox.enter import drop_capabilities\n"
        f"try: drop_capabilities()\nexcept OSError: pass\n{install}\n"
        f"{CALLS}\nprint(json.dumps(f({names!r})))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def filtered() -> dict[str, str]:
    """What each call gives with the filter."""
    return run_calls(True)


@pytest.mark.parametrize("name", [*seccomp.DENIED, "prctl PDEATHSIG"])
def test_a_denied_call(filtered: dict[str, str], name: str) -> None:
    assert filtered[name] == "EPERM"


def test_all_other_ways(filtered: dict[str, str]) -> None:
    """Arguments that are denied, other architectures' numbers, and numbers that are too new."""
    assert len(filtered) > len(seccomp.DENIED) + 25
    for name, result in filtered.items():
        missing = name.startswith(MISSING)
        assert result == ("ENOSYS" if missing else "EPERM"), name


def test_without_a_filter_the_calls_are_open() -> None:
    results = run_calls(False, OPEN)
    assert [name for name in OPEN if results[name] == "EPERM"] == []
    assert results["flock"] == results["memfd_create"] == results["fcntl SETLK"] == "done"
    assert results["mmap 1"] == "done"


def test_numbers() -> None:
    header = next((Path(path) for path in HEADERS if Path(path).exists()), None)
    if header is None:
        pytest.skip("the kernel's headers are not here (Debian: linux-libc-dev)")
    numbers = dict(re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()))
    ours = dict(seccomp.DENIED) | {"clone": seccomp.CLONE, "clone3": seccomp.CLONE3}
    ours["mmap"] = seccomp.MMAP
    for name, (number, *_) in (seccomp.DENIED_ARGUMENTS | seccomp.ALLOWED_ARGUMENTS).items():
        ours[name] = number
    assert {name: int(numbers[name]) for name in ours} == ours


def test_another_architecture_has_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert seccomp.make_filter() == b""
