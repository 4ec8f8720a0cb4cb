"""Count the wrong verdicts of graders: wrong answers that pass, and right answers that fail.

    python bench/graders.py --data-dir DATA

The graders are ours, strict and literature; lm-eval's, if it is installed
(requirements-crosscheck.txt); and math-verify alone, on the whole response. They judge the labelled
responses in tests/eval, without the contested ones, and every gold answer in DATA written in 20
forms that give it and 10 that do not (tests/support/answer_forms.py, with a fixed seed).
lm-eval is slow: with --lm-eval-every N it gets every N-th problem. Each count stands with its n.
Without --data-dir only the labelled responses are judged.
"""

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from eval.crosscheck import harness
from eval.tasks import BENCHMARKS
from eval.tasks.base import GRADERS, Problem
from tests.support.graded_forms import (
    ANSWER_BENCHMARKS,
    FormCase,
    grade_cases,
    list_form_cases,
)
from tests.support.grader_cases import FILES, read_grader_cases

LM_EVAL_RULES = {
    "strict-match": "lm-eval strict-match",
    "flexible-extract": "lm-eval flexible-extract",
    "exact_match": "lm-eval exact_match",
    "math_verify": "lm-eval math_verify",
}


def list_labelled_cases(benchmark: str, file: str) -> list[FormCase]:
    """Return the uncontested labelled responses of one benchmark in one file."""
    cases = []
    for row in read_grader_cases(benchmark, files=(file,)):
        if not row.get("contested"):
            problem = Problem(f"{benchmark}/{row['id']}", "", row["reference"])
            cases.append(FormCase(problem, row["output"], row["expected"]))
    return cases


def count_wrong(
    name: str, grader: str, cases: Sequence[FormCase], verdicts: Sequence[bool]
) -> dict:
    """Return the record of one grader on one set of cases."""
    pairs = list(zip(cases, verdicts, strict=True))
    return {
        "set": name,
        "grader": grader,
        "n": len(cases),
        "wrong_passes": sum(passed and not case.expected for case, passed in pairs),
        "wrong_fails": sum(case.expected and not passed for case, passed in pairs),
    }


def verify_alone(output: str, reference: str) -> bool:
    """Return math-verify's verdict of a whole response. It must run in a main thread."""
    from math_verify import parse, verify

    try:
        return bool(verify(parse(f"${reference}$"), parse(output)))
    except Exception:  # noqa: BLE001 (sympy may raise anything for an answer it cannot read)
        return False


def grade_with_math_verify(cases: Sequence[FormCase]) -> list[bool]:
    """Return math-verify's verdicts, from one process for each core."""
    outputs = [case.output for case in cases]
    references = [case.problem.reference for case in cases]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        return list(pool.map(verify_alone, outputs, references, chunksize=20))


def grade_with_lm_eval(benchmark: str, cases: Sequence[FormCase]) -> dict[str, list[bool]]:
    """Return the verdicts of each of lm-eval's rules; none if it is missing or has no grader."""
    if benchmark not in harness.GRADED or importlib.util.find_spec("lm_eval") is None:
        return {}
    documents = []
    for i, case in enumerate(cases):
        row = {"id": str(i), "reference": case.problem.reference, "output": case.output}
        documents.append(row | {"prompt": "-"})
    with tempfile.TemporaryDirectory() as folder:
        task = harness.write_generate_task(Path(folder), benchmark, documents)
        judgements = harness.run_lm_eval(Path(folder), [task], None, 1)
    verdicts: dict[str, list[bool]] = {}
    for judgement in judgements:
        of_rule = verdicts.setdefault(LM_EVAL_RULES[judgement.rule], [False] * len(cases))
        of_rule[int(judgement.id)] = judgement.passed
    return verdicts


def judge(
    name: str, benchmark: str, cases: list[FormCase], for_lm_eval: list[FormCase]
) -> list[dict]:
    """Print and return the records of all graders on `cases`, of lm-eval's on `for_lm_eval`."""
    records = []
    threads = len(os.sched_getaffinity(0))
    for grader in GRADERS:
        verdicts = list(grade_cases(benchmark, cases, grader, threads))
        records.append(count_wrong(name, grader, cases, verdicts))
    if benchmark in harness.GRADED:
        records.append(count_wrong(name, "math-verify", cases, grade_with_math_verify(cases)))
    for rule, verdicts in grade_with_lm_eval(benchmark, for_lm_eval).items():
        records.append(count_wrong(name, rule, for_lm_eval, verdicts))
    for record in records:
        print(render_record(record), flush=True)
    return records


def render_record(record: dict) -> str:
    """Return one line of the printed table."""
    counts = f"{record['n']:>7} {record['wrong_passes']:>13} {record['wrong_fails']:>12}"
    return f"{record['set']:<34} {record['grader']:<26} {counts}"


def measure(data_dir: Path | None, every: int, lm_eval_every: int) -> list[dict]:
    """Print a table and return its records."""
    print(f"{'set':<34} {'grader':<26} {'n':>7} {'wrong passes':>13} {'wrong fails':>12}")
    records = []
    for file in FILES:
        for benchmark in BENCHMARKS:
            cases = list_labelled_cases(benchmark, file) if BENCHMARKS[benchmark].grade else []
            if cases:
                name = f"{file.removesuffix('.jsonl')} {benchmark}"
                records += judge(name, benchmark, cases, cases)
    for benchmark in ANSWER_BENCHMARKS if data_dir else ():
        cases = list_form_cases(benchmark, data_dir, every)
        for_lm_eval = list_form_cases(benchmark, data_dir, every * lm_eval_every)
        records += judge(f"forms of {benchmark}", benchmark, cases, for_lm_eval)
    return records


def main() -> None:
    """Measure, and write the records with the command and the machine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="folder with the benchmarks' files")
    parser.add_argument("--every", type=int, default=1, help="every N-th problem (default: all)")
    parser.add_argument(
        "--lm-eval-every", type=int, default=1, help="of these, every N-th for lm-eval"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "bench/results/graders.json",
        help="default bench/results/graders.json",
    )
    arguments = parser.parse_args()
    if importlib.util.find_spec("lm_eval") is None:
        print("lm-eval is not installed: pip install --no-deps -r requirements-crosscheck.txt")
    records = measure(arguments.data_dir, arguments.every, arguments.lm_eval_every)
    options = f"--every {arguments.every} --lm-eval-every {arguments.lm_eval_every}"
    result = {
        "command": f"python bench/graders.py --data-dir DATA {options}",
        "machine": f"{len(os.sched_getaffinity(0))} CPU cores, Python {platform.python_version()}",
        "lm_eval": importlib.util.find_spec("lm_eval") is not None,
        "records": records,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
