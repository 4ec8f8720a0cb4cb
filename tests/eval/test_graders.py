"""Both graders of MATH and commonsense against labelled cases, every gold answer, and hostile text."""

import json
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.equivalence import equivalent
from eval.errors import EvalError
from eval.tasks import GROUPS, TASKS, commonsense, expand, math

CASES = [
    json.loads(line)
    for line in Path(__file__).with_name("grader_cases.jsonl").read_text().splitlines()
]
BY_ID = [
    pytest.param(case, id=f"{case['bench']}-{case['id']}")
    for case in CASES
    if case["bench"] != "gsm8k"
]


def graded(case: dict, protocol: str) -> bool:
    if case["bench"] == "math":
        return math.grade(case["output"], case["reference"], protocol)
    return commonsense.grade(case["output"], case["reference"], case["bench"], protocol)


@pytest.mark.parametrize("case", BY_ID)
def test_labelled_cases(case: dict) -> None:
    found = graded(case, "strict")
    if case.get("contested"):
        print(f"contested: {case['output']!r} for {case['reference']}: {found} ({case['why']})")
    else:
        assert found is case["expected"], case["why"]
    if case["literature"] in (True, False):
        assert graded(case, "literature") is case["literature"]


MATH = [
    (
        r"The answer is: $\left( 3, \frac{\pi}{2} \right)$.",
        r"\left( 3, \frac{\pi}{2} \right)",
        True,
    ),
    (r"So $\boxed{5}$ at first, and in the end $\boxed{7}$.", "7", True),
    (r"So $\boxed{5}$ at first, and in the end $\boxed{7}$.", "5", False),
    (r"The final answer is \boxed{\dfrac{1}{2}}", r"\frac12", True),
    ("The answer is 4", "4", True),
    ("4", "4", False),  # no answer is stated
    ("The answer is: 2x+1", "1+2x", True),
    ("The answer is: 0.333", r"\frac{1}{3}", False),
    ("The answer is: 1,000", "1000", True),
    ("The answer is: 1,2", "2,1", True),  # solutions have no order
    ("The answer is: (1,2)", "(2,1)", False),
    (r"The answer is: 45^\circ", "45", True),
    (r"The answer is: \text{Tuesday}", r"\text{Monday}", False),
    ("The answer is:", "7", False),
    (r"The answer is: \boxed{", "7", False),
]


@pytest.mark.parametrize(("output", "reference", "expected"), MATH, ids=range(len(MATH)))
def test_math(output: str, reference: str, expected: bool) -> None:
    assert math.grade(output, reference) is expected


HOSTILE = [
    "__import__('os').system('touch {marker}')",
    r"9^{9^{9^{9}}}",
    "(" * 3000 + "7" + ")" * 3000,
    "x" * 100_000,
    r"\frac{" * 40,
    "\x00\ud800",
    "100000000!",
    r"\int_0^{10^{10}} \sin(x^x) dx",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_end_in_time_without_effect(text: str, tmp_path: Path) -> None:
    marker, start = tmp_path / "marker", time.monotonic()
    assert math.grade("The answer is: " + text.replace("{marker}", str(marker)), "7") is False
    assert time.monotonic() - start < 10
    assert not marker.exists()


def test_the_limit_holds_in_threads_and_the_next_question_is_answered() -> None:
    found = {}

    def ask(name: str, answer: str) -> None:
        found[name] = [equivalent(answer, "7", timeout=2), equivalent("14/2", "7")]

    threads = [
        threading.Thread(target=ask, args=pair)
        for pair in (("slow", r"9^{9^{9^{9}}}"), ("right", "7.0"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"slow": [False, True], "right": [True, True]}


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=40))
def test_graders_never_raise(text: str) -> None:
    for protocol in ("strict", "literature"):
        assert math.grade(f"The answer is: {text}", "7", protocol) in (True, False)
        assert math.grade(text, text, protocol) in (True, False)
        assert commonsense.grade(text, "true", "boolq", protocol) in (True, False)


def test_every_gold_answer_of_math500_is_right_and_a_changed_one_wrong(shared: Path) -> None:
    problems = TASKS["math500"].rows(shared / "data", None)
    assert len(problems) == 500
    references = [problem.reference for problem in problems]
    for form in ("The answer is: {}", "The answer is: ${}$.", "Therefore \\boxed{{{}}}."):
        wrong = [r for r in references if not math.grade(form.format(r), r)]
        assert wrong == []
    changed = [r for r in references if math.grade(f"The answer is: {r} + 1", r)]
    assert changed == []
    assert [r for r in references if not math.grade(f"The answer is: {r}", r, "literature")] == []
    of_math = TASKS["math"].rows(shared / "data", None)
    assert len(of_math) == 1000
    assert [
        p.reference for p in of_math if not math.grade(f"The answer is: {p.reference}", p.reference)
    ] == []


@pytest.mark.parametrize("task", commonsense.TASKS)
def test_every_gold_label_is_right_and_another_wrong(task: str, shared: Path) -> None:
    problems = TASKS[task].rows(shared / "data", None)
    assert len(problems) == 200
    labels = commonsense.TASKS[task].labels
    for problem in problems:
        for protocol in ("strict", "literature"):
            for label in labels:
                said = commonsense.grade(
                    f"the correct answer is {label}", problem.reference, task, protocol
                )
                assert said is (label == problem.reference)


def test_the_hubs_rows_become_the_published_instructions(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "hellaswag").mkdir()
    raw = (shared / "data" / "hellaswag_val_raw_1000.jsonl").read_text()
    (tmp_path / "hellaswag" / "test.jsonl").write_text(raw)
    made = {(p.question, p.reference) for p in TASKS["hellaswag"].rows(tmp_path, None)}
    published = [(p.question, p.reference) for p in TASKS["hellaswag"].rows(shared / "data", None)]
    assert all(pair in made for pair in published)


RAW = {
    "boolq": (
        {"question": "is it so", "answer": True, "passage": "p"},
        "Please answer the following question with true or false, question: is it so?\n\nAnswer format: true/false",
        "true",
    ),
    "piqa": (
        {"goal": "To do it.", "sol1": "a", "sol2": "b", "label": 1},
        "Please choose the correct solution to the question: To do it.\n\nSolution1: a\n\nSolution2: b\n\n"
        "Answer format: solution1/solution2",
        "solution2",
    ),
    "siqa": (
        {
            "context": "C.",
            "question": "Q?",
            "answerA": "a",
            "answerB": "b",
            "answerC": "c",
            "label": "3",
        },
        "Please choose the correct answer to the question: C. Q?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
    ),
    "winogrande": (
        {"sentence": "The _ is.", "option1": "a", "option2": "b", "answer": "2"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: The _ is.\n\n"
        "Option1: a Option2: b Answer format: option1/option2",
        "option2",
    ),
    "arc_easy": (
        {
            "question": "Q?",
            "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        "Please choose the correct answer to the question: Q?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer2",
    ),
    "openbookqa": (
        {
            "question_stem": "Q",
            "choices": {"text": ["a", "b"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        "Please choose the correct answer to the question: Q\n\nAnswer1: a Answer2: b\n\n"
        "Answer format: answer1/answer2",
        "answer1",
    ),
}


@pytest.mark.parametrize("task", RAW)
def test_the_hubs_own_fields(task: str, tmp_path: Path) -> None:
    row, instruction, reference = RAW[task]
    (tmp_path / task).mkdir()
    (tmp_path / task / "test.json").write_text(json.dumps([row]))
    (problem,) = TASKS[task].rows(tmp_path, None)
    assert (problem.question, problem.reference) == (instruction, reference)
    (tmp_path / task / "test.json").write_text(json.dumps([{"foo": 1}]))
    with pytest.raises(EvalError, match="row 1 has neither"):
        TASKS[task].rows(tmp_path, None)


def test_groups_expand_and_name_each_suite_once() -> None:
    assert expand(["commonsense", "gsm8k", "piqa"]) == [*GROUPS["commonsense"], "gsm8k"]
    assert len(GROUPS["commonsense"]) == 8
