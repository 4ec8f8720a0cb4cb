"""Read the labelled responses in tests/eval/grader_cases.jsonl."""

import json

from tests.support.paths import ROOT


def read_grader_cases(*benchmarks: str) -> list[dict]:
    """Return the cases of some benchmarks.

    Returns:
        Rows {bench, id, output, reference, expected, literature, why}, and `contested` where people
        disagree about the label.
    """
    text = (ROOT / "tests" / "eval" / "grader_cases.jsonl").read_text(encoding="utf-8")
    cases = [json.loads(line) for line in text.splitlines()]
    return [case for case in cases if case["bench"] in benchmarks]
