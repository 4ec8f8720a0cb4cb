"""evalplus' check of programs, in our box: by itself it runs them with no isolation.

In it a program made for that can forge its pass (evalplus judges in the process that ran it): good to compare verdicts
with, not to score by.
"""

import importlib.util
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from eval.errors import EvalError
from eval.sandbox import check as sandbox
from eval.tasks.base import Problem

TIMEOUT = 100.0  # seconds of one program; evalplus' own limit is about 60
_WORKER = Path(__file__).with_name("evalplus_box.py").read_text(encoding="utf-8")


def check(suite: str, problems: Sequence[Problem], programs: Sequence[str]) -> list[bool | None]:
    """Whether evalplus passes each program, of the problem at the same place; None where it cannot check the problem.

    Raises EvalError where bubblewrap does not work, or evalplus does not in it.
    """
    modules = [importlib.util.find_spec(name) for name in ("evalplus", "numpy", "psutil")]
    folders = tuple(
        dict.fromkeys(str(Path(module.origin).resolve().parents[1]) for module in modules)
    )
    one = partial(_one, suite.partition("_")[0], folders)
    if one(problems[0], problems[0].reference) == "no verdict":
        raise EvalError(
            f"evalplus: it does not run in the box; can every user read {', '.join(folders)}?"
        )
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(one, problems, programs))
    return [None if status == "fault" else status == "pass" for status in found]


def _one(dataset: str, folders: tuple[str, ...], problem: Problem, program: str) -> str:
    """evalplus' status (pass, fail, timeout), "fault" where it cannot check the problem, or "no verdict"."""
    tests = {key: problem.tests[key] for key in ("entry_point", "setup", "tests")}
    job = {
        "folders": folders,
        "dataset": dataset,
        "program": program,
        "reference": problem.reference,
        **tests,
    }
    out = sandbox.run(_WORKER, json.dumps(job).encode(), TIMEOUT, folders)
    try:
        answer = json.loads(out or b"")
        return "fault" if "fault" in answer else str(answer["status"])
    except (ValueError, TypeError, KeyError):  # late, killed, or written over by the program
        return "no verdict"
