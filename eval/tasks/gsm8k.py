r"""GSM8K: grade-school word problems with a numeric answer (1,319 test problems, openai/gsm8k).

A row: {"question": "Janet's ducks lay 16 eggs ...",
"answer": "She sells 16 - 3 - 4 = ... \n#### 18"}. Decoding is zero-shot and greedy; the model
writes "The answer is: 18" as MetaMathQA taught it.
"""

import re
from fractions import Fraction
from itertools import islice
from pathlib import Path

from eval.errors import EvalError
from eval.tasks.base import ALPACA_PROMPT, Benchmark, Grader, Problem
from eval.tasks.loading import Source, read_rows, read_text_field

SOURCE = Source("gsm8k", ("gsm8k_test.jsonl", "gsm8k/test.jsonl"), "openai/gsm8k", "main", "test")
# The stops of CorDA and Astra. They also cut prose such as "Response time", and 1 of the 1,319 gold
# solutions.
STOPS = ("Instruction:", "Instruction", "Response:", "Response")
MAX_CHARACTERS = 400  # a longer answer counts as none; Python refuses to read very long integers

# What comes before a stated final answer. The last one in a response counts.
_MARKER = re.compile(r"answer\W{0,4}(?:is\b|[:=])\W{0,4}?[:=]?|####", re.IGNORECASE)
# One level of braces within a box, such as \boxed{1{,}200}.
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
# 18, -1.5, .5, 1e3, 36/2, and mixed numbers such as 1 1/2.
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s?(?:(?P<whole>\d+)\s+(?=\d+\s*/\s*\d))?"
    r"(?P<top>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?)(?:\s*/\s*(?P<bottom>\d+))?"
)
# A whole output such as "$18." counts as an answer, one such as "She needs 18." does not.
_BARE_NUMBER = re.compile(r"[^\w\s]?\s*-?[\d.,/ ]+[^\w\s]?")
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_NOISE = re.compile(r"\\[$!,;%()\[\]]|\\(?:text|mathrm|mathbf)\b|[$€£¥¢%*_{}]|\\boxed")
# What follows explains the answer ("18, because 20 - 2 = 18") and may hold other numbers.
_STATEMENT_END = re.compile(r"\.(?:\s|$)|[;!?]|,\s+(?=[A-Za-z])|\b(?:because|since|as)\b")


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
        if not marker or _parse_value(reference) is None:
            raise EvalError(
                f"gsm8k: the answer of row {number} of {data_dir or SOURCE.hub_id} "
                "has no number after ####"
            )
        problems.append(Problem(f"gsm8k/{number - 1}", question, reference.strip()))
    return problems


def grade_answer(output: str, reference: str, grader: Grader = "strict") -> bool:
    r"""Return whether `output` gives the number `reference` as its final answer. Never raises.

    strict: exact rational arithmetic without rounding. The answer is the text after the last
    "answer is", "answer:", "answer =" or "####" that any text follows; if a \boxed{} comes before
    the first digit of that text, it is the content of the box. Without a marker the answer is the
    last \boxed{}, else an output that is nothing but a number. Only the first statement of the
    answer is read: up to the end of the line or sentence, a comma before words, or a word such as
    "because". Currency and percent signs, units, thousands separators and markup are dropped. A
    word of scale multiplies its number: "2 thousand" is 2000. In an equation the last side that
    holds a single number counts. Two different numbers ("18 or 20") are no answer.

    literature: MetaMath's rule (and PiSSA's) with its quirks. Only "The answer is: ", to the
    letter, is a marker. One separator of the number after it is read, so 1,450,000 is 1450. The
    number is rounded to an integer, halves to even. A division by 0 gives the numerator.
    """
    if grader == "literature":
        return _grade_literature(output, reference)
    wanted = _parse_value(reference)
    answer = extract_answer(output)
    return answer is not None and wanted is not None and answer == wanted


def _grade_literature(output: str, reference: str) -> bool:
    _, marker, after = output.rpartition("The answer is: ")
    match = re.search(r"[\-+]?\d*[.,/]?\d+", after) if marker else None
    if match is None or len(match.group()) > MAX_CHARACTERS:
        return False
    top, slash, bottom = match.group().replace(",", "").partition("/")
    try:
        value = Fraction(int(top), int(bottom)) if slash and bottom != "0" else float(top)
        return float(round(float(value))) == float(reference.replace(",", ""))
    except (ValueError, ZeroDivisionError, OverflowError):
        # An answer such as "3/00" ended MetaMath's whole evaluation; here it is wrong.
        return False


def extract_answer(output: str) -> Fraction | None:
    """Return the final answer that `output` gives, or None if it gives none or several."""
    markers = list(_MARKER.finditer(output))
    if markers:
        text = _find_stated_answer(output, markers)
        boxes = _BOXED.findall(text)
        # "The answer is: 18. In a box: \boxed{20}" states 18 first.
        if boxes and not re.search(r"\d", text.partition("\\boxed")[0]):
            text = boxes[0]
        return _parse_value(text)
    boxes = _BOXED.findall(output)
    if boxes:
        return _parse_value(boxes[-1])
    if len(output) <= MAX_CHARACTERS and _BARE_NUMBER.fullmatch(output.strip()):
        return _parse_value(output)
    return None


def _find_stated_answer(output: str, markers: list[re.Match]) -> str:
    """Return the text after the last of `markers` that any text follows."""
    for marker in reversed(markers):
        after = output[marker.end() :].strip()
        if after:
            return after
    return ""


def _parse_value(text: str) -> Fraction | None:
    """Return the one number that the first statement in `text` gives, or None."""
    text = text.strip().partition("\n")[0].replace("\u2212", "-").replace("\u00a0", " ")
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = text.replace("{,}", ",").replace(",\\!", ",").replace("\\!", "")
    text = _NOISE.sub("", text)
    text = re.sub(r"(?<=\d)[, '\u2019\u202f](?=\d{3}(?!\d))", "", text)  # thousands separators
    text = _STATEMENT_END.split(text, maxsplit=1)[0]
    if len(text) > MAX_CHARACTERS or re.match(r"\W*not\b", text):
        return None
    for side in reversed(text.split("=")):  # "20 - 2 = 18" and "18 = 20 - 2"
        if re.match(r"\W*\d", side):  # "18 (out of 20)", but not "eighteen (18)"
            side = re.split(r"\(|\bout of\b", side, maxsplit=1)[0]
        values = {_parse_number(match, side) for match in _NUMBER.finditer(side)}
        if len(values) == 1:
            return values.pop()
    return None


def _parse_number(match: re.Match, text: str) -> Fraction | None:
    """Return the value of a match of `_NUMBER` in `text`, or None for a division by zero."""
    sign = -1 if match["sign"] == "-" else 1
    words_after = text[match.end() :].split()
    scale = _SCALES.get(words_after[0].lower().strip(".,"), 1) if words_after else 1
    try:
        part = Fraction(match["top"]) / Fraction(match["bottom"] or 1)
        return sign * (Fraction(match["whole"] or 0) + part) * scale
    except ZeroDivisionError:
        return None


def format_metamath_prompt(question: str) -> str:
    """Return the prompt of MetaMath and CorDA, which is the same for GSM8K and MATH."""
    return ALPACA_PROMPT.format(instruction=question) + " Let's think step by step."


BENCHMARKS = (
    Benchmark(
        name="gsm8k",
        kind="answer",
        read_problems=read_problems,
        format_literature_prompt=format_metamath_prompt,
        stops=STOPS,
        max_new_tokens=1024,
        grade=lambda output, problem, grader: grade_answer(output, problem.reference, grader),
    ),
)
