"""Grade variants of the reference programs, and measure the programs per minute.

    python bench/programs.py --data-dir DATA                      (some minutes)
    python bench/programs.py --data-dir DATA --against CHECKOUT   also the speed of another checkout

DATA holds humaneval.jsonl and mbpp.jsonl. The variants, of tests/support/program_variants.py, are
reference programs, rewritten and in other forms of a response; the verdict of each is compared with
that of plain `exec`. The speed is that of HumanEval's references in each kind of box, as many at a
time as there are processors. With --against, both checkouts take turns, the first of each pair too,
and the ratio is that of each pair: run it on a machine that does nothing else. Where it does, the
CPU time of a program is the better measure.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: imports are to be looked up from the repository root
    sys.path[0] = str(ROOT)

from eval.grading import grade_responses
from eval.sandbox.box import LEVELS
from eval.tasks import BENCHMARKS
from tests.support.program_variants import make_variants, run_plainly

# Runs in a checkout, which may be of another commit; prints the seconds, the CPU seconds of the
# programs and their boxes, and the number that passed.
_MEASURE = """
import resource, sys, time
sys.path[0] = "."
from pathlib import Path
from eval.sandbox.box import find_box
from eval.sandbox.check import Job, check_programs
from eval.tasks import BENCHMARKS
box = find_box(sys.argv[1])
jobs = []
for problem in BENCHMARKS["humaneval"].read_problems(Path(sys.argv[2]), None):
    tests = problem.tests
    jobs.append(Job(problem.reference, tests["tests"], tests["entry_point"], setup=tests["setup"]))
list(check_programs(jobs[:4], box=box))
def read_cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
start, cpu = time.perf_counter(), read_cpu_seconds()
passed = sum(verdict.passed for verdict in check_programs(jobs, box=box))
print(time.perf_counter() - start, read_cpu_seconds() - cpu, passed, len(jobs))
"""


def count_equal_verdicts(data_dir: Path) -> dict:
    """Grade every variant; return how many verdicts are plain exec's, and the others' names."""
    variants = make_variants(data_dir)
    plain = run_plainly(variants)
    problems = [variant.problem for variant in variants]
    outputs = [variant.output for variant in variants]
    graded = grade_responses(BENCHMARKS["humaneval"], problems, outputs, ["strict"])
    different = []
    for variant, wanted, grades in zip(variants, plain, graded, strict=True):
        if grades["strict"].passed != wanted:
            different.append(variant.name)
    return {"variants": len(variants), "right_in_plain_python": sum(plain), "different": different}


def measure_speed(checkout: Path, level: str, data_dir: Path) -> dict[str, float]:
    """Return the programs per minute of a checkout in one kind of box, and a program's CPU time.

    Raises:
        RuntimeError: a reference does not pass.
    """
    command = [sys.executable, "-c", _MEASURE, level, str(data_dir)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    seconds, cpu_seconds, passed, total = done.stdout.split()
    if passed != total:
        raise RuntimeError(f"{checkout}: {passed} of {total} references pass in {level}")
    return {
        "programs_per_minute": 60 * int(total) / float(seconds),
        "cpu_ms_per_program": 1000 * float(cpu_seconds) / int(total),
    }


def compare_speeds(level: str, data_dir: Path, against: Path | None, pairs: int) -> dict:
    """Measure the speed here and in `against`, in pairs whose order alternates.

    Returns:
        {here, against: the measurements, ratios: of each pair, medians: of the ratios}.
    """
    checkouts = {"here": ROOT} | ({} if against is None else {"against": against.resolve()})
    found: dict = {name: [] for name in checkouts}
    for pair in range(pairs):
        names = list(checkouts) if pair % 2 == 0 else list(reversed(checkouts))
        for name in names:
            found[name].append(measure_speed(checkouts[name], level, data_dir))
    if against is not None:
        found["ratios"], found["medians"] = {}, {}
        for key in found["here"][0]:
            both = zip(found["here"], found["against"], strict=True)
            found["ratios"][key] = [a[key] / b[key] for a, b in both]
            found["medians"][key] = statistics.median(found["ratios"][key])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--against", type=Path, help="checkout of another commit")
    parser.add_argument("--pairs", type=int, default=5, help="default %(default)s")
    parser.add_argument("--no-variants", action="store_true", help="only the speed")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "bench" / "results" / "programs.json",
        help="default %(default)s",
    )
    arguments = parser.parse_args()
    data_dir = arguments.data_dir.resolve()
    found: dict = {
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "speed": {},
    }
    for level in LEVELS:
        speeds = compare_speeds(level, data_dir, arguments.against, arguments.pairs)
        found["speed"][level] = speeds
        for key in ("programs_per_minute", "cpu_ms_per_program"):
            here = statistics.median(speed[key] for speed in speeds["here"])
            ratio = f", {speeds['medians'][key]:.3f} times --against" if "medians" in speeds else ""
            print(f"{level}: {key} {here:.0f}{ratio}", flush=True)
    if not arguments.no_variants:
        found |= count_equal_verdicts(data_dir)
        equal = found["variants"] - len(found["different"])
        print(f"variants: {equal} of {found['variants']} verdicts are plain exec's")
        for name in found["different"]:
            print(f"  differs: {name}")
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
