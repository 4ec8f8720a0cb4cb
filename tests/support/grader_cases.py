"""Read the labelled responses in tests/eval/grader_cases.jsonl and grader_cases_2.jsonl."""

import json

from tests.support.paths import ROOT

FILES = ("grader_cases.jsonl", "grader_cases_2.jsonl")
CONTESTED = json.loads(
    (ROOT / "tests" / "eval" / "contested_verdicts.json").read_text(encoding="utf-8")
)


def read_grader_cases(*benchmarks: str, files: tuple[str, ...] = FILES) -> list[dict]:
    """Return the cases of some benchmarks.

    Returns:
        Rows {bench, id, output, reference, expected, why}, and `contested` where people disagree
        about the label. The first file has also `literature`, that grader's verdict.
    """
    cases = []
    for file in files:
        text = (ROOT / "tests" / "eval" / file).read_text(encoding="utf-8")
        cases += [json.loads(line) for line in text.splitlines()]
    return [case for case in cases if case["bench"] in benchmarks]


def find_strict_verdict(case: dict) -> bool:
    """Return the verdict that the strict grader must give.

    That is the label. Where people disagree about the label it is the verdict that strict gave when
    tests/eval/contested_verdicts.json was written, so that a change of it is seen.
    """
    if case.get("contested"):
        return CONTESTED[f"{case['bench']}-{case['id']}"]
    return case["expected"]
