r"""GSM8K: grade-school word problems with a numeric answer (1,319 test problems, openai/gsm8k).

A row: {"question": "Janet's ducks lay 16 eggs ...",
"answer": "She sells 16 - 3 - 4 = ... \n#### 18"}. Decoding is zero-shot and greedy; the model
writes "The answer is: 18" as MetaMathQA taught it.
"""

import re
from fractions import Fraction
from itertools import islice
from pathlib import Path

from eval.answers.compare import is_number
from eval.answers.read import read_answer
from eval.equivalence import are_equivalent
from eval.errors import EvalError
from eval.tasks.base import ALPACA_PROMPT, Benchmark, Grader, Problem
from eval.tasks.loading import Source, read_rows, read_text_field

SOURCE = Source("gsm8k", ("gsm8k_test.jsonl", "gsm8k/test.jsonl"), "openai/gsm8k", "main", "test")
# The stops of CorDA and Astra. They also cut prose such as "Response time", and 1 of the 1,319 gold
# solutions.
STOPS = ("Instruction:", "Instruction", "Response:", "Response")
MAX_CHARACTERS = 400  # a longer answer counts as none; Python refuses to read very long integers


def read_problems(data_dir: Path | None, limit: int | None = None) -> list[Problem]:
    """Read the first `limit` problems from a file in `data_dir`, or from the hub if it is None.

    Raises:
        EvalError: no file exists, or a row is not a problem; the message names it.
    """
    problems = []
    for number, row in enumerate(islice(read_rows(SOURCE, data_dir), limit), start=1):
        question = read_text_field(row, "question", SOURCE, number)
        solution = read_text_field(row, "answer", SOURCE, number)
        _, marker, reference = solution.rpartition("####")
        if not marker or not is_number(reference):
            raise EvalError(
                f"gsm8k: the answer of row {number} of {data_dir or SOURCE.hub_id} "
                "has no number after ####"
            )
        problems.append(Problem(f"gsm8k/{number - 1}", question, reference.strip()))
    return problems


def grade_answer(output: str, reference: str, grader: Grader = "strict") -> bool:
    r"""Return whether `output` gives the number `reference` as its final answer. Never raises.

    strict: the final answer that eval.answers.read finds, compared exactly by eval.equivalence; the
    rule is in docs/graders.md. No rounding, and two different numbers ("18 or 20") are no answer.

    literature: MetaMath's rule (and PiSSA's) with its quirks. Only "The answer is: ", to the
    letter, is a marker. One separator of the number after it is read, so 1,450,000 is 1450. The
    number is rounded to an integer, halves to even. A division by 0 gives the numerator.
    """
    if grader == "literature":
        return _grade_literature(output, reference)
    answer = read_answer(output)
    return answer is not None and are_equivalent(answer, reference, word_problem=True)


def finds_answer(output: str, grader: Grader = "strict") -> bool:
    """Return whether `output` gives an answer at all that `grader` can read. Never raises."""
    find = _find_literature if grader == "literature" else read_answer
    return find(output) is not None


def _find_literature(output: str) -> str | None:
    _, marker, after = output.rpartition("The answer is: ")
    match = re.search(r"[\-+]?\d*[.,/]?\d+", after) if marker else None
    return match.group() if match and len(match.group()) <= MAX_CHARACTERS else None


def _grade_literature(output: str, reference: str) -> bool:
    number = _find_literature(output)
    if number is None:
        return False
    top, slash, bottom = number.replace(",", "").partition("/")
    try:
        value = Fraction(int(top), int(bottom)) if slash and bottom != "0" else float(top)
        return float(round(float(value))) == float(reference.replace(",", ""))
    except (ValueError, ZeroDivisionError, OverflowError):
        # An answer such as "3/00" ended MetaMath's whole evaluation; here it is wrong.
        return False


def format_metamath_prompt(question: str) -> str:
    """Return the prompt of MetaMath and CorDA, which is the same for GSM8K and MATH."""
    return ALPACA_PROMPT.format(instruction=question) + " Let's think step by step."


BENCHMARKS = (
    Benchmark(
        name="gsm8k",
        kind="answer",
        num_problems=1319,
        read_problems=read_problems,
        format_literature_prompt=format_metamath_prompt,
        stops=STOPS,
        max_new_tokens=1024,
        grade=lambda output, problem, grader: grade_answer(output, problem.reference, grader),
        finds_answer=finds_answer,
    ),
)
