"""Strict passes 20 forms of every gold answer and fails 10; literature's verdicts are pinned.

Needs the shared benchmarks; without them the forms of a few answers here. A sample in some seconds;
all 85,000 responses in full, in some minutes.
"""

import json
from pathlib import Path

import pytest

from eval.tasks import BENCHMARKS
from eval.tasks.base import Problem
from tests.support.graded_forms import (
    ANSWER_BENCHMARKS,
    FormCase,
    grade_cases,
    hash_verdicts,
    list_form_cases,
    make_forms,
)
from tests.support.grader_cases import FILES, read_grader_cases
from tests.support.paths import ROOT

# Recorded with the code of the commit it names. Published scores rest on these verdicts.
PINNED = json.loads((ROOT / "tests" / "eval" / "literature_verdicts.json").read_text())
REFERENCES = {
    "gsm8k": ("18", "-3", "1,450,000", "0"),
    "math": (r"\frac{3}{4}", "[-36,104]", r"\text{(A)}", "1,-2"),
    "boolq": ("true", "false"),
    "siqa": ("answer2",),
}


def find_wrong_verdicts(benchmark: str, cases: list[FormCase], threads: int = 1) -> list[FormCase]:
    verdicts = grade_cases(benchmark, cases, "strict", threads)
    return [case for case, passed in zip(cases, verdicts, strict=True) if passed != case.expected]


@pytest.mark.parametrize("benchmark", REFERENCES)
def test_forms_of_some_answers(benchmark: str) -> None:
    cases = []
    for i, reference in enumerate(REFERENCES[benchmark]):
        problem = Problem(f"{benchmark}/{i}", "", reference)
        forms = make_forms(benchmark, problem)
        assert (len(forms.equivalent), len(forms.different)) == (20, 10)
        cases += [FormCase(problem, output, True) for output in forms.equivalent]
        cases += [FormCase(problem, output, False) for output in forms.different]
    assert find_wrong_verdicts(benchmark, cases) == []


@pytest.mark.parametrize("benchmark", ANSWER_BENCHMARKS)
def test_forms_of_a_sample_of_gold_answers(benchmark: str, benchmark_data: Path) -> None:
    cases = list_form_cases(benchmark, benchmark_data, every=250)
    assert find_wrong_verdicts(benchmark, cases) == []


@pytest.mark.full
@pytest.mark.parametrize("benchmark", ANSWER_BENCHMARKS)
def test_forms_of_all_gold_answers(benchmark: str, benchmark_data: Path) -> None:
    cases = list_form_cases(benchmark, benchmark_data)
    assert find_wrong_verdicts(benchmark, cases, threads=2) == []


@pytest.mark.parametrize("file", FILES)
def test_literature_is_as_it_was_on_the_labelled_cases(file: str) -> None:
    verdicts = ""
    for case in read_grader_cases(*ANSWER_BENCHMARKS, files=(file,)):
        problem = Problem(str(case["id"]), "", case["reference"])
        passed = BENCHMARKS[case["bench"]].grade(case["output"], problem, "literature")
        verdicts += "1" if passed else "0"
    assert verdicts == PINNED["cases"][file]


@pytest.mark.full
@pytest.mark.parametrize("benchmark", ANSWER_BENCHMARKS)
def test_literature_is_as_it_was_on_the_forms(benchmark: str, benchmark_data: Path) -> None:
    cases = list_form_cases(benchmark, benchmark_data)
    assert hash_verdicts(grade_cases(benchmark, cases, "literature")) == PINNED["forms"][benchmark]
