"""Verdicts of the sandbox: values and exceptions cross it, and reasons are one line.

Needs Linux with bubblewrap or user namespaces; kinds of box that this machine lacks are skipped.
Half a minute on two processors.
"""

import concurrent.futures
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from eval.errors import EvalError
from eval.sandbox.box import Box, choose_bubblewrap
from eval.sandbox.check import Job, check_programs, run_in_box
from eval.sandbox.seccomp import make_filter
from tests.support.sandbox import BOXES, check, show_to_all
from tests.support.sandbox_values import VALUES

pytestmark = pytest.mark.xdist_group("sandbox")  # they look for processes that stayed behind

SAME = "def f(x):\n    return x"


def test_values_cross_the_box(any_box: None) -> None:
    plain = [value for value in VALUES if type(value) is not range]
    loop = f"for x in {plain[:5] + plain[7:]}: assert f(x) == x, x"
    tests = f"from collections import *\ninf = float('inf')\n{loop}"
    assert check(SAME, tests, "f").reason == "passed"
    # Exact types: True is not written as 1, and 1.0 is no integer.
    assert check(
        SAME, "assert [type(f(x)) for x in (1, 1.0, True)] == [int, float, bool]", "f"
    ).passed
    assert check("def f(a, *, b): return a - b", "assert f(5, b=3) == 2", "f").passed
    assert check(
        "import re\ndef f(x): return re.match('a', x)", "assert f('a')\nassert f('b') is None", "f"
    ).passed


def test_exceptions_cross_the_box(any_box: None) -> None:
    tests = "try: f(0)\nexcept ZeroDivisionError: pass\nelse: assert False"
    assert check("def f(x): return 1 / x", tests, "f").passed
    assert check("class E(ZeroDivisionError): pass\ndef f(x): raise E", tests, "f").passed
    assert check("def f(x): raise ValueError('bad')", tests, "f").reason == "raised ValueError: bad"
    assert check("def f(x): return x", tests, "f").reason.startswith("wrong answer")
    # A test that takes every exception does not take the end of the program for one.
    tests = "try: f(0)\nexcept BaseException: pass"
    assert check("import os\ndef f(x): os._exit(0)", tests, "f").reason == "the program ended"


@pytest.mark.parametrize(
    ("solution", "reason"),
    [
        ("def f(x): return 3", "wrong answer: assert f(2) == 4"),
        ("def f(x): return 1 / 0", "raised ZeroDivisionError: division by zero"),
        ("import nothing_like_it", "raised ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("def g(x): return 4", "no function named f"),
        ("def f(x) return 4", "syntax error: expected ':' (line 1)"),
        ("", "no function named f"),
        ("def f(x):\n    return 4\nif __name__ == '__main__':\n    f(input())", "passed"),
        (
            "from dataclasses import dataclass\n"
            "@dataclass\nclass A:\n    a: int\ndef f(x):\n    return A(4).a",
            "passed",
        ),
    ],
)
def test_reasons(any_box: None, solution: str, reason: str) -> None:
    verdict = check(solution, "assert f(2) == 4", "f")
    assert verdict == (reason == "passed", reason, next(iter(BOXES)))


def test_a_wrong_kind_of_value_says_why(any_box: None) -> None:
    verdict = check("def f(x): return None", "assert abs(f(2) - 4) < 1e-6", "f")
    assert verdict.reason.startswith("wrong answer: assert abs(f(2) - 4) < 1e-6 (raised TypeError")


def test_set_up_does_not_hide_the_solution(any_box: None) -> None:
    setup = "def helper(x):\n    return x + 1\n\ndef f(x):\n    pass\n"
    tests = "def check(candidate): assert candidate(3) == helper(3)\ncheck(f)"
    assert check("def f(x): return x + 1", tests, "f", setup=setup).passed
    assert not check("def f(x): return x", tests, "f", setup=setup).passed


@pytest.mark.parametrize(
    ("program", "shown"),
    [
        ("def f(x): return list(set(x))", "f(list('abcdefgh'))"),  # listed in the box
        ("def f(x): return set(x)", "list(f(list('abcdefgh')))"),  # listed in the judge
        ("def f(x): return list(x)", "f(set('abcdefgh'))"),  # made in the judge
    ],
)
def test_the_same_words_in_the_same_order(any_box: None, program: str, shown: str) -> None:
    """A set of strings has one order in every run, so a program has one verdict."""
    jobs = [Job(program, f"raise ValueError({shown})", "f")] * 6
    reasons = {verdict.reason for verdict in check_programs(jobs)}
    assert len(reasons) == 1 and "'a'" in reasons.pop()


@pytest.mark.parametrize(
    ("tests", "fault"),
    [
        ("assert f(2) ==", "the tests of f: syntax error"),
        ("assert True", "the tests never call f"),
        ("assert f(int) == 4", "in_box=True"),
        ("assert f(lambda: 1) == 4", "in_box=True"),
    ],
)
def test_broken_tests_are_no_wrong_answer(any_box: None, tests: str, fault: str) -> None:
    with pytest.raises(EvalError, match=fault):
        check("def f(x): return 4", tests, "f")


def test_a_value_handed_back_is_no_fault_of_the_tests(any_box: None) -> None:
    verdict = check("def f(x): return object()", "assert f(f(2)) == 4", "f")
    assert verdict.reason.startswith("wrong answer: assert f(f(2)) == 4")


def test_reasons_are_one_printable_line(any_box: None) -> None:
    verdict = check(
        "def f(x): raise ValueError('a\\x1b[2Jb\\n\\ud800' + 'c' * 999)", "assert f(2) == 4", "f"
    )
    assert (
        verdict.reason.startswith("raised ValueError: a?[2Jb ?ccc") and len(verdict.reason) == 200
    )


def test_tests_in_the_box(box: Box) -> None:
    solution = "class Node:\n    value = 4\ndef f(node):\n    return node.value"
    setup, tests = "node = Node()", "assert f(node) == 4\nassert isinstance(node, Node)"
    shown = f"{box.level}, tests in the box"
    right = check(solution, tests, "f", box, setup=setup, in_box=True)
    assert right == (True, "passed", shown)
    solution = solution.replace("value = 4", "value = 3")
    wrong = check(solution, tests, "f", box, setup=setup, in_box=True)
    assert wrong == (False, "wrong answer: assert f(node) == 4", shown)


def test_in_threads_and_processes(any_box: None, nothing_left: None) -> None:
    arguments = ("def f(x): return 4", "assert f(2) == 4", "f")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(
            future.result().passed for future in [pool.submit(check, *arguments) for _ in range(16)]
        )
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
        assert all(
            future.result().passed for future in [pool.submit(check, *arguments) for _ in range(4)]
        )


def test_no_file_stays_open(any_box: None) -> None:
    check(SAME, "assert f(1) == 1", "f")
    before = len(os.listdir("/proc/self/fd"))
    jobs = [Job(SAME, "assert f(1) == 1", "f"), Job("while True: pass", "f(1)", "f", timeout=0.3)]
    assert len(list(check_programs(jobs * 3))) == 6
    assert len(os.listdir("/proc/self/fd")) == before


# A measurement of speed: the other tests check verdicts, their order and time limits.
@pytest.mark.full
def test_500_short_programs_in_a_minute(any_box: None, nothing_left: None) -> None:
    """Half of them wrong; the bound is for a machine that does something else too."""
    jobs = [
        Job(f"def f(x):\n    return x + {n % 2}", f"assert f({n}) == {n + 1}", "f")
        for n in range(500)
    ]
    began = time.monotonic()
    verdicts = list(check_programs(jobs))
    took = time.monotonic() - began
    print(f"500 programs in {took:.1f} s")
    assert [verdict.passed for verdict in verdicts] == [n % 2 == 1 for n in range(500)]
    assert took < 90


PROBE = """
import json, os, socket, sys
def tried(what):
    try:
        what()
        return "done"
    except OSError as error:
        return type(error).__name__
job = json.load(sys.stdin)
print(json.dumps({
    "read": open(job["folder"] + "/library.py").read(),
    "write": tried(lambda: open(job["folder"] + "/new", "w")),
    "outside": tried(lambda: os.listdir(job["outside"])),
    "network": tried(lambda: socket.create_connection(("127.0.0.1", 9), 1)),
    "shared memory": tried(lambda: open("/dev/shm/x", "w").close()),
    "environment": sorted(set(os.environ) - {"PYTHONHASHSEED", "LANG", "LC_CTYPE", "PWD"}),
}))
"""


def test_a_checker_runs_in_the_box_with_its_libraries_alone(tmp_path: Path) -> None:
    if "bubblewrap" not in BOXES:
        pytest.skip("bubblewrap does not work here")
    folder, outside = tmp_path / "library", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    show_to_all(folder)
    (folder / "library.py").write_text("x = 1")
    job = json.dumps({"folder": str(folder), "outside": str(outside)}).encode()
    box = choose_bubblewrap((str(folder),))
    out = run_in_box(PROBE, job, 20, box)
    assert json.loads(out) == {
        "read": "x = 1",
        "write": "OSError",
        "outside": "FileNotFoundError",
        "network": "PermissionError" if make_filter() else "ConnectionRefusedError",
        "shared memory": "done",
        "environment": [],
    }
    assert run_in_box("import time; time.sleep(60)", b"", 1, box) is None
