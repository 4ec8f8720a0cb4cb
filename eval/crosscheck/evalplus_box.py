"""Runs in the box, evalplus with it: one program against the calls that the benchmark's own tests make.

Reads {folders, dataset, program, reference, entry_point, setup, tests} as JSON; writes {status} or {fault} as JSON.
evalplus compares with what the reference returns to the inputs in its data. Those files are not needed: the inputs of
its base check are recorded here, from the tests, run against the reference.
"""

import copy
import json
import os
import resource
import sys
import time

LIMITS = {
    resource.RLIMIT_FSIZE: 16 << 20,
    resource.RLIMIT_NPROC: 64,
    resource.RLIMIT_CPU: 90,
    resource.RLIMIT_CORE: 0,
}


def record(job: dict) -> list[tuple]:
    """(arguments, value, seconds) of every call that the tests make, of the reference."""
    own: dict = {"__name__": "reference"}
    exec(job["reference"], own)
    function, calls = own[job["entry_point"]], []

    def recorded(*arguments):  # noqa: ANN002, ANN202
        given, start = copy.deepcopy(arguments), time.time()
        value = function(*arguments)
        calls.append((given, copy.deepcopy(value), time.time() - start))
        return value

    names = dict(
        own
    )  # a namespace of the tests: the reference's own calls of itself are not recorded
    exec(job["setup"], names)
    names[job["entry_point"]] = recorded
    exec(job["tests"], names)
    return calls


def main() -> None:
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    job = json.load(sys.stdin)
    for kind, most in LIMITS.items():
        resource.setrlimit(kind, (most, most))
    sys.path += job["folders"]
    from evalplus.eval import MBPP_OUTPUT_NOT_NONE_TASKS, untrusted_check

    answer = {}
    try:
        inputs, expected, seconds = zip(*record(job), strict=True)
    except Exception as error:  # noqa: BLE001 (of the benchmark's own code: told, and left out by the caller)
        answer = {"fault": f"{type(error).__name__}: {error}"[:200]}
    else:
        name = job["entry_point"]
        if job["dataset"] == "mbpp" and name in MBPP_OUTPUT_NOT_NONE_TASKS:
            expected = [value is not None for value in expected]
        atol = (
            1e-4 if name == "find_zero" else 0
        )  # HumanEval/32's own tolerance; evalplus adds 1e-6 for floats
        status, _ = untrusted_check(
            job["dataset"], job["program"], inputs, name, expected, atol, seconds, fast_check=True
        )
        answer = {"status": status}
    os.write(answers, json.dumps(answer).encode())


if __name__ == "__main__":
    main()
