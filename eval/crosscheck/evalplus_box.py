"""Check one program with evalplus, in the box, by the calls that the benchmark's own tests make.

Reads {folders, dataset, program, reference, entry_point, setup, tests} as JSON, and writes {status}
or {fault} as JSON. evalplus compares with what the reference returns for the inputs in its data
files. Those files are not needed here: the inputs of its base check are recorded from the tests,
which run against the reference.
"""

import copy
import json
import os
import resource
import sys
import time
from typing import Any

LIMITS = {
    resource.RLIMIT_FSIZE: 16 << 20,
    resource.RLIMIT_NPROC: 64,
    resource.RLIMIT_CPU: 90,
    resource.RLIMIT_CORE: 0,
}


def record_calls(job: dict) -> list[tuple]:
    """Return (arguments, value, seconds) of every call that the tests make of the reference."""
    own: dict = {"__name__": "reference"}
    exec(job["reference"], own)
    function, calls = own[job["entry_point"]], []

    def call_recorded(*arguments: Any) -> Any:
        given, start = copy.deepcopy(arguments), time.time()
        value = function(*arguments)
        calls.append((given, copy.deepcopy(value), time.time() - start))
        return value

    # The tests have names of their own, so the reference's calls of itself are not recorded.
    names = dict(own)
    exec(job["setup"], names)
    names[job["entry_point"]] = call_recorded
    exec(job["tests"], names)
    return calls


def main() -> None:
    """Check the program of the job on standard input."""
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # threads count as processes, which are limited
    job = json.load(sys.stdin)
    for kind, most in LIMITS.items():
        resource.setrlimit(kind, (most, most))
    sys.path += job["folders"]  # the box starts Python without site-packages
    os.write(answers, json.dumps(_check_program(job)).encode())


def _check_program(job: dict) -> dict[str, str]:
    from evalplus.eval import MBPP_OUTPUT_NOT_NONE_TASKS, untrusted_check

    try:
        inputs, expected, seconds = zip(*record_calls(job), strict=True)
    except Exception as error:  # noqa: BLE001 (a fault of the benchmark's own code, for the caller)
        return {"fault": f"{type(error).__name__}: {error}"[:200]}
    name = job["entry_point"]
    if job["dataset"] == "mbpp" and name in MBPP_OUTPUT_NOT_NONE_TASKS:
        expected = [value is not None for value in expected]
    # The tolerance of HumanEval/32; for other floats evalplus adds 1e-6.
    tolerance = 1e-4 if name == "find_zero" else 0
    status, _ = untrusted_check(
        job["dataset"], job["program"], inputs, name, expected, tolerance, seconds, fast_check=True
    )
    return {"status": status}


if __name__ == "__main__":
    main()
