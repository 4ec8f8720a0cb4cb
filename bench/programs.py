"""Grade variants of the reference programs, and measure the programs per minute.

    python bench/programs.py --data-dir DATA                      (some minutes)
    python bench/programs.py --data-dir DATA --against CHECKOUT   also the speed of another checkout

DATA holds humaneval.jsonl and mbpp.jsonl. The variants are those of tests/support/program_variants.py:
reference programs, rewritten and in other forms of a response; the verdict of each is compared with
that of plain `exec`. The speed is that of HumanEval's references in each kind of box, as many at a
time as there are processors. With --against, both checkouts take turns, the first of each pair too,
and the ratio is that of each pair: run it on a machine that does nothing else.
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

# Runs in a checkout, which may be of another commit; prints the seconds and the number that passed.
_MEASURE = """
import sys, time
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
check_programs(jobs[:4], box=box)
start = time.perf_counter()
passed = sum(verdict.passed for verdict in check_programs(jobs, box=box))
print(time.perf_counter() - start, passed, len(jobs))
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


def measure_rate(checkout: Path, level: str, data_dir: Path) -> float:
    """Return the programs per minute of a checkout in one kind of box.

    Raises:
        RuntimeError: a reference does not pass.
    """
    command = [sys.executable, "-c", _MEASURE, level, str(data_dir)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    seconds, passed, total = done.stdout.split()
    if passed != total:
        raise RuntimeError(f"{checkout}: {passed} of {total} references pass in {level}")
    return 60 * int(total) / float(seconds)


def compare_rates(level: str, data_dir: Path, against: Path | None, pairs: int) -> dict:
    """Measure the programs per minute here and in `against`, in pairs whose order alternates."""
    checkouts = {"here": ROOT} | ({} if against is None else {"against": against.resolve()})
    rates: dict[str, list[float]] = {name: [] for name in checkouts}
    for pair in range(pairs):
        names = list(checkouts) if pair % 2 == 0 else list(reversed(checkouts))
        for name in names:
            rates[name].append(measure_rate(checkouts[name], level, data_dir))
    found: dict = {f"programs_per_minute_{name}": rates[name] for name in rates}
    if against is not None:
        ratios = [a / b for a, b in zip(rates["here"], rates["against"], strict=True)]
        found |= {"ratios": ratios, "median_ratio": statistics.median(ratios)}
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
        rates = compare_rates(level, data_dir, arguments.against, arguments.pairs)
        found["speed"][level] = rates
        here = statistics.median(rates["programs_per_minute_here"])
        ratio = f", {rates['median_ratio']:.3f} times --against" if "ratios" in rates else ""
        print(f"{level}: {here:.0f} programs per minute{ratio}", flush=True)
    if not arguments.no_variants:
        found |= count_equal_verdicts(data_dir)
        equal = found["variants"] - len(found["different"])
        print(f"variants: {equal} of {found['variants']} verdicts are plain exec's")
        for name in found["different"]:
            print(f"  differs: {name}")
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
