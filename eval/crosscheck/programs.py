"""Run evalplus' check of programs in our box: by itself, evalplus runs them without isolation.

evalplus judges in the process that ran the program, so a program that is made for it can forge its
pass, in the box too. Its verdicts are for comparison, not for scores.
"""

import importlib.util
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from eval.errors import EvalError
from eval.sandbox.box import Box, choose_bubblewrap
from eval.sandbox.check import run_in_box
from eval.tasks.base import Problem

TIMEOUT = 100.0  # seconds for one program; evalplus' own limit is about 60
_WORKER = Path(__file__).with_name("evalplus_box.py").read_text(encoding="utf-8")


def check_with_evalplus(
    benchmark: str, problems: Sequence[Problem], programs: Sequence[str]
) -> list[bool | None]:
    """Return whether evalplus passes each program, or None where it cannot check the problem.

    Args:
        problems: the problem of each program.

    Raises:
        EvalError: bubblewrap does not work, or evalplus does not work in it.
    """
    folders = _find_library_folders()
    box = choose_bubblewrap(folders)
    check = partial(_check_one, benchmark.partition("_")[0], folders, box)
    # One reference first: else a box that lacks a library would look like failed programs.
    if check(problems[0], problems[0].reference) == "no verdict":
        raise EvalError(
            f"evalplus: it does not run in the box; can every user read {', '.join(folders)}?"
        )
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        statuses = list(pool.map(check, problems, programs))
    return [None if status == "fault" else status == "pass" for status in statuses]


def _find_library_folders() -> tuple[str, ...]:
    folders = {}
    for name in ("evalplus", "numpy", "psutil"):
        module = Path(importlib.util.find_spec(name).origin)
        folders[str(module.resolve().parents[1])] = None
    return tuple(folders)


def _check_one(
    dataset: str, folders: tuple[str, ...], box: Box, problem: Problem, program: str
) -> str:
    """Return evalplus' status of one program.

    Returns:
        "pass", "fail" or "timeout"; "fault" where it cannot check the problem; else "no verdict".
    """
    job = {
        "folders": folders,
        "dataset": dataset,
        "program": program,
        "reference": problem.reference,
        "entry_point": problem.tests["entry_point"],
        "setup": problem.tests["setup"],
        "tests": problem.tests["tests"],
    }
    out = run_in_box(_WORKER, json.dumps(job).encode(), TIMEOUT, box)
    try:
        answer = json.loads(out or b"")
        return "fault" if "fault" in answer else str(answer["status"])
    except (ValueError, TypeError, KeyError):  # late, killed, or overwritten by the program
        return "no verdict"
