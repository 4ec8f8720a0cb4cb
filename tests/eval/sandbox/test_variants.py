"""Variants of the reference programs, in the forms of responses: the verdict is plain exec's.

Labelled responses with code too: the verdict is the label.

Needs Linux with bubblewrap or user namespaces, and the shared HumanEval and MBPP. A few seconds;
two minutes with the `full` one.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from eval.grading import grade_responses
from eval.tasks import BENCHMARKS
from tests.support.grader_cases import find_strict_verdict, read_grader_cases
from tests.support.program_variants import REWRITES, Variant, make_variants, run_plainly

pytestmark = [
    pytest.mark.xdist_group("sandbox"),  # they look for processes that stayed behind
    pytest.mark.filterwarnings("ignore:invalid escape sequence"),
]


def grade_variants(variants: Sequence[Variant]) -> list[bool]:
    """Return whether the strict grader passes each response."""
    problems = [variant.problem for variant in variants]
    outputs = [variant.output for variant in variants]
    # The two benchmarks extract programs alike, but for the prompt that a problem may have.
    graded = grade_responses(BENCHMARKS["humaneval"], problems, outputs, ["strict"])
    return [grades["strict"].passed for grades in graded]


def find_differences(variants: Sequence[Variant]) -> list[str]:
    """Return the names of the variants whose verdict is not plain exec's."""
    plain, graded = run_plainly(variants), grade_variants(variants)
    print(f"{len(variants)} variants, {sum(plain)} of them right in plain Python")
    assert 0 < sum(plain) < len(variants)
    pairs = zip(variants, plain, graded, strict=True)
    return [variant.name for variant, wanted, found in pairs if wanted != found]


def test_some_variants(shared: Path, any_box: None) -> None:
    variants = random.Random(0).sample(make_variants(shared / "data"), 28)
    assert find_differences(variants) == []


@pytest.mark.full
def test_all_variants(shared: Path, any_box: None) -> None:
    variants = make_variants(shared / "data")
    assert {variant.rewrite for variant in variants} == set(REWRITES)
    assert find_differences(variants) == []


@pytest.mark.parametrize("benchmark", ["humaneval", "mbpp"])
def test_labelled_responses(benchmark: str, shared: Path, any_box: None) -> None:
    cases = read_grader_cases(benchmark)
    assert len(cases) == {"humaneval": 7, "mbpp": 28}[benchmark]
    read = BENCHMARKS[benchmark].read_problems(shared / "data", None)
    problems = {problem.id: problem for problem in read}
    graded = grade_responses(
        BENCHMARKS[benchmark],
        [problems[case["reference"]] for case in cases],
        [case["output"] for case in cases],
        ["strict"],
    )
    wrong = []
    for case, grades in zip(cases, graded, strict=True):
        if grades["strict"].passed != find_strict_verdict(case):
            wrong.append((case["id"], case["why"], grades["strict"]))
    assert wrong == []
