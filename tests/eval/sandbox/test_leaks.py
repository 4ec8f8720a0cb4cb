"""What once got out of a box, or into one: nothing does, in both boxes, for root and for a user.

Needs Linux with bubblewrap or user namespaces; root for the half of the tests that root runs, and
for the mounts. About twenty seconds.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval.sandbox import box as box_module
from eval.sandbox.box import LEVELS, PYTHON_FLAGS, UNPROTECTED, Box, choose_box, get_interpreter
from eval.sandbox.check import Job, Verdict
from eval.sandbox.seccomp import make_filter
from tests.support.leaks import CALLS, HOSTILE_SETUP, HOSTILE_TESTS, LEAKS, STAYING
from tests.support.sandbox import (
    BOXES,
    check,
    check_as,
    find_boxed_processes,
    find_programs_of,
    make_caller,
    show_to_all,
)

pytestmark = [
    pytest.mark.xdist_group("sandbox"),  # they look for processes that stayed behind
    pytest.mark.slow,
]

HOLDERS = [(level, who) for level in LEVELS for who in ("root", "user")]
# What is mounted over, in a mount namespace of the test's own: two folders and a file.
FOLDERS = ["/usr/share/doc", f"{os.path.realpath(sys.base_prefix)}/include"]
FILES = [f"{os.path.dirname(os.__file__)}/this.py", "/usr/lib/os-release"]
MOUNT = """
for folder in FOLDERS; do
  mount -t tmpfs -o mode=777 tmpfs $folder && echo WORD > $folder/data.txt || exit 1
done
for file in FILES; do mount --bind WITNESS $file || exit 1; done
exec "$@"
"""
ALLOWED = ("EPERM", "ENOSYS")
CALLS_TEST = f"""
found = f()
wrong = {{name: result for name, result in found.items() if result not in {ALLOWED!r}}}
if wrong or len(found) < 100: raise ValueError(wrong)
"""
CHILDREN = """
import os, time
def f(x):
    for _ in range(5):
        if os.fork() == 0:
            block = bytearray(300 << 20)
            for at in range(0, len(block), 4096): block[at] = 1
            time.sleep(60)
    time.sleep(60)
"""
# The children share the memory of their parent.
SHARING = """
import os, time
block = bytearray(250 << 20)
for at in range(0, len(block), 4096): block[at] = 1
def f(x):
    for _ in range(5):
        if os.fork() == 0:
            time.sleep(0.5)
            os._exit(0)
    for _ in range(5): os.wait()
    return 4
"""
ENDLESS = "assert f(2) == 4\nwhile True: pass"


def fill(text: str, word: str, witness: Path, port: int) -> str:
    """Return a program with values in the place of its words in capitals."""
    places = {"FOLDERS": FOLDERS, "MOUNTS": FOLDERS, "FILES": FILES, "WITNESS": witness}
    places |= {"FOLDER": witness.parent, "PORT": port, "CALLER": os.getpid(), "WORD": word}
    for name, value in places.items():
        text = text.replace(name, str(value))
    return text


def make_jobs(word: str, witness: Path, port: int) -> dict[str, Job]:
    jobs = {
        name: Job(text, "found = f()\nif found: raise ValueError(found)", "f")
        for name, text in LEAKS.items()
    }
    if make_filter():
        jobs["system calls"] = Job(CALLS, CALLS_TEST, "f")
    jobs["children with memory"] = Job(CHILDREN, "f(2)", "f")
    jobs["children that share memory"] = Job(SHARING, "assert f(2) == 4", "f")
    solution = "def f(x): return 4"
    jobs["hostile tests"] = Job(solution, HOSTILE_SETUP + HOSTILE_TESTS, "f")
    jobs["hostile setup"] = Job(solution, HOSTILE_TESTS, "f", HOSTILE_SETUP)
    jobs["endless tests"] = Job("def f(x): return 4", ENDLESS, "f", timeout=0.5)
    tests = "import os\nfor fd in range(3, 60):\n    try: os.write(fd, b'{' * 99999)\n"
    tests += "    except OSError: pass\nos._exit(0)"
    jobs["tests on the judge's channel"] = Job("def f(x): return 4", tests, "f", timeout=1)
    filled = {}
    for name, job in jobs.items():
        texts = (job.solution, job.tests, job.setup)
        solution, tests, setup = (fill(text, word, witness, port) for text in texts)
        filled[name] = job._replace(solution=solution, tests=tests, setup=setup)
    return filled


@pytest.fixture(scope="module", params=HOLDERS, ids="-".join)
def verdicts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Verdict]:
    """Return the verdict of each leak in one box for one caller, where mounts lie below /usr."""
    level, who = request.param
    if level not in BOXES:
        pytest.skip(f"{level} does not work on this machine")
    folder = tmp_path_factory.mktemp("leaks")
    witness = folder / "witness.txt"
    witness.write_text("intact")
    for path in (folder, witness):
        path.chmod(0o777)  # a user may write there
    word = f"secret{os.getpid()}{time.monotonic_ns()}"
    before = []
    if os.geteuid() == 0:
        mount = MOUNT.replace("WORD", word).replace("WITNESS", str(witness))
        mount = mount.replace("FOLDERS", " ".join(FOLDERS)).replace("FILES", " ".join(FILES))
        before = ["unshare", "--mount", "--", "sh", "-c", mount, "sh"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        jobs = make_jobs(word, witness, server.getsockname()[1])
        found = check_as(who, level, list(jobs.values()), before)
    assert [path.name for path in folder.iterdir()] == ["witness.txt"]
    assert witness.read_text() == "intact"
    assert not [path for path in ("/", "/tmp", "/var/tmp", "/usr") if Path(path, word).exists()]
    return dict(zip(jobs, found, strict=True))


@pytest.mark.parametrize("name", [*LEAKS, "system calls", "hostile tests", "hostile setup"])
def test_nothing_leaks(verdicts: dict[str, Verdict], name: str) -> None:
    if name == "system calls" and not make_filter():
        pytest.skip("there is a filter for x86-64 only")
    assert verdicts[name].reason == "passed"


def test_a_box_is_bounded_as_a_whole(verdicts: dict[str, Verdict]) -> None:
    assert verdicts["children with memory"].reason == "took more than 1024 MiB of memory"
    assert verdicts["children that share memory"].reason == "passed"


def test_the_judge_is_bounded(verdicts: dict[str, Verdict]) -> None:
    assert verdicts["endless tests"].reason == "timed out after 0.5 s"
    reason = verdicts["tests on the judge's channel"].reason
    assert reason == "the judge could not read its answers"


def test_hostile_tests_are_hostile(tmp_path: Path) -> None:
    """A control: where nothing isolates, the same tests read and write."""
    unprotected = Box(UNPROTECTED, [get_interpreter(), *PYTHON_FLAGS])
    witness = tmp_path / "witness.txt"
    witness.write_text("intact")
    harmless = HOSTILE_SETUP.replace("os.kill(CALLER, 9)", "1").replace("'/WORD'", "'/no/WORD'")
    tests = fill(harmless + HOSTILE_TESTS, "WORD", witness, 9)
    verdict = check("def f(x): return 4", tests, "f", unprotected)
    assert verdict.reason == "wrong answer: assert not done, done"
    assert (tmp_path / "WORD").exists()


CALLER = """
import sys
from eval.sandbox import box
from eval.sandbox.check import Job, check_program
level, no_filter, program = sys.argv[1:]
if no_filter:
    box.make_filter = lambda: b""
found = box.find_box(level)
if found is None:
    print("no box", flush=True)
    sys.exit()
print(found.lacks, flush=True)
check_program(Job(program, "f(2)", "f", timeout=60), found)
"""


def read_lacks(caller: subprocess.Popen, level: str, who: str) -> str:
    """Return what the box of CALLER lacks; skip the test where it has no box."""
    lacks = caller.stdout.readline().strip()
    if lacks == "no box":
        pytest.skip(f"{level} does not work on this machine for {who}")
    return lacks


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    """Check that the test leaves no process in a box."""
    before = find_boxed_processes()
    yield
    until = time.monotonic() + 20
    while find_boxed_processes() - before and time.monotonic() < until:
        time.sleep(0.02)
    assert find_boxed_processes() - before == set()


@pytest.mark.parametrize(
    "no_filter",
    ["", pytest.param("no filter", marks=pytest.mark.full)],
    ids=["filter", "no filter"],
)
@pytest.mark.parametrize(("level", "who"), HOLDERS)
def test_nothing_outlives_a_killed_caller(level: str, who: str, no_filter: str) -> None:
    if level not in BOXES:
        pytest.skip(f"{level} does not work on this machine")
    command = [*make_caller(who), "-c", CALLER, level, no_filter, STAYING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as caller:
        lacks = read_lacks(caller, level, who)
        # Three processes of the program, and the judge.
        until = time.monotonic() + 30
        while len(inside := find_programs_of(caller.pid)) < 4 and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.1)  # they clear their death signals
        caller.kill()
    assert len(inside) >= 4
    until = time.monotonic() + 20
    while inside & find_boxed_processes() and time.monotonic() < until:
        time.sleep(0.02)
    assert inside & find_boxed_processes() == set()
    assert lacks == ("no filter of system calls" if no_filter or not make_filter() else "")


# A race, tried at six moments; the order of the messages is what rules it out.
@pytest.mark.full
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_stays_if_the_caller_dies_at_once(level: str, nothing_stays: None) -> None:
    """While the boxes are set up they are not bound to it yet, but no program runs."""
    if level not in BOXES:
        pytest.skip(f"{level} does not work on this machine")
    for delay in (0, 5, 10, 20, 40, 80):
        command = [*make_caller("user"), "-c", CALLER, level, "", STAYING]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as caller:
            read_lacks(caller, level, "user")
            time.sleep(delay / 1000)
            caller.kill()


def test_an_old_bubblewrap_is_not_silent(
    any_box: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    show_to_all(tmp_path)  # the box's user runs it
    old = tmp_path / "bwrap"
    old.write_text("#!/bin/sh\necho 'bwrap: Unknown option --disable-userns' >&2\nexit 1\n")
    old.chmod(0o755)
    path = f"{tmp_path}:{box_module.ENVIRONMENT['PATH']}"
    monkeypatch.setitem(box_module.ENVIRONMENT, "PATH", path)
    monkeypatch.setattr(box_module, "_find_best_box", box_module._find_best_box.__wrapped__)
    box = choose_box(allow_unsandboxed=True)
    assert box.level != "bubblewrap"
    verdict = check("def f(x): return 4", "assert f(2) == 4", "f", box)
    assert verdict.isolation.startswith(f"{box.level} (bubblewrap does not work: bwrap: ")
    assert "--disable-userns" in verdict.isolation
