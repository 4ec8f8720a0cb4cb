r"""GSM8K: grade-school word problems with a numeric answer (1,319 test problems, openai/gsm8k).

A row: {"question": "Janet's ducks lay 16 eggs ...", "answer": "She sells 16 - 3 - 4 = ... \n#### 18"}.
Zero-shot, greedy; the model writes "The answer is: 18" as MetaMathQA taught it.
"""

import re
from fractions import Fraction
from itertools import islice
from pathlib import Path

from eval.errors import EvalError
from eval.tasks.base import ALPACA, Grader, Problem, Suite
from eval.tasks.loading import Source, read, text

SOURCE = Source("gsm8k", ("gsm8k_test.jsonl", "gsm8k/test.jsonl"), "openai/gsm8k", "main", "test")

# Where a response states its final answer; the last of them counts.
_MARKER = re.compile(r"answer\W{0,4}(?:is\b|[:=])\W{0,4}?[:=]?|####", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s?(?:(?P<whole>\d+)\s+(?=\d+\s*/\s*\d))?"
    r"(?P<top>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?)(?:\s*/\s*(?P<bottom>\d+))?"
)
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_NOISE = re.compile(r"\\[$!,;%()\[\]]|\\(?:text|mathrm|mathbf)\b|[$€£¥¢%*_{}]|\\boxed")
MAX_DIGITS = 400  # longer answers are no answers, and Python refuses to read them


def rows(data_dir: Path | None, limit: int | None = None) -> list[Problem]:
    """The first `limit` problems, of the files in `data_dir`, or of the hub.

    Raises:
        EvalError: no file, or a row that is not a problem; the message names it.
    """
    problems = []
    for number, row in enumerate(islice(read(SOURCE, data_dir), limit), start=1):
        question, answer = (
            text(row, "question", SOURCE, number),
            text(row, "answer", SOURCE, number),
        )
        _, marker, reference = answer.rpartition("####")
        if not marker or _value(reference) is None:
            raise EvalError(
                f"gsm8k: the answer of row {number} of {data_dir or SOURCE.hub_id} has no number after ####"
            )
        problems.append(Problem(f"gsm8k/{number - 1}", question, reference.strip()))
    return problems


def grade(output: str, reference: str, protocol: Grader = "strict") -> bool:
    """Whether `output` gives the number `reference` as its final answer. Never raises.

    strict: exact rational arithmetic, no rounding. The answer is what follows the last "answer is", "answer:" or
    "####" that anything follows, else the last \\boxed{}, else an output that is nothing but a number. Currency and
    percent signs, units, thousands separators and markup are dropped; of an equation the side that is one number
    counts; two different numbers ("18 or 20") are no answer.

    literature: MetaMath's rule (and PiSSA's), with its quirks: only "The answer is: ", to the letter, is a marker; of
    the number after it one separator is read (1,450,000 is 1450); it is rounded to an integer, halves to even; a
    division by 0 gives the numerator.
    """
    if protocol == "literature":
        return _literature(output, reference)
    wanted = _value(reference)
    answer = extract(output)
    return answer is not None and wanted is not None and answer == wanted


def _literature(output: str, reference: str) -> bool:
    _, marker, after = output.rpartition("The answer is: ")
    match = re.search(r"[\-+]?\d*[.,/]?\d+", after) if marker else None
    if match is None or len(match.group()) > MAX_DIGITS:
        return False
    try:
        top, slash, bottom = match.group().replace(",", "").partition("/")
        value = round(
            float(Fraction(int(top), int(bottom)) if slash and bottom != "0" else float(top))
        )
        return float(value) == float(reference.replace(",", ""))
    except (
        ValueError,
        ZeroDivisionError,
        OverflowError,
    ):  # "3/00" ended MetaMath's whole evaluation
        return False


def extract(output: str) -> Fraction | None:
    """The final answer that `output` gives, or None if it gives none or several."""
    markers = list(_MARKER.finditer(output))
    boxes = _BOXED.findall(output)
    if markers:
        text = next(
            (after for marker in reversed(markers) if (after := output[marker.end() :].strip())), ""
        )
        boxes = _BOXED.findall(text)
        if boxes and not re.search(r"\d", text.partition("\\boxed")[0]):
            text = boxes[0]
    elif boxes:
        text = boxes[-1]
    elif len(output) <= MAX_DIGITS and re.fullmatch(
        r"[^\w\s]?\s*-?[\d.,/ ]+[^\w\s]?", output.strip()
    ):
        text = output
    else:
        return None
    return _value(text)


def _value(text: str) -> Fraction | None:
    """The one number that the first statement of `text` gives."""
    text = text.strip().partition("\n")[0].replace("\u2212", "-").replace("\u00a0", " ")
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = text.replace("{,}", ",").replace(",\\!", ",").replace("\\!", "")
    text = _NOISE.sub("", text)
    text = re.sub(r"(?<=\d)[, '\u2019\u202f](?=\d{3}(?!\d))", "", text)
    text = re.split(
        r"\.(?:\s|$)|[;!?]|,\s+(?=[A-Za-z])|\b(?:because|since|as)\b", text, maxsplit=1
    )[0]
    if len(text) > MAX_DIGITS or re.match(r"\W*not\b", text):
        return None
    for side in reversed(text.split("=")):  # "20 - 2 = 18" and "18 = 20 - 2"
        side = re.split(r"\(|\bout of\b", side, maxsplit=1)[0] if re.match(r"\W*\d", side) else side
        values = {_number(match, side) for match in _NUMBER.finditer(side)}
        if len(values) == 1:
            return values.pop()
    return None


def _number(match: re.Match, text: str) -> Fraction | None:
    """The number of one match of _NUMBER in `text`; None for a division by zero."""
    sign = -1 if match["sign"] == "-" else 1
    after = text[match.end() :].split()
    scale = _SCALES.get(after[0].lower().strip(".,"), 1) if after else 1
    try:
        part = Fraction(match["top"]) / Fraction(match["bottom"] or 1)
        return sign * (Fraction(match["whole"] or 0) + part) * scale
    except ZeroDivisionError:
        return None


def literature_prompt(question: str) -> str:
    """MetaMath's and CorDA's, for GSM8K and MATH alike."""
    return ALPACA.format(instruction=question) + " Let's think step by step."


SUITE = Suite(
    name="gsm8k",
    kind="answer",
    rows=rows,
    literature_prompt=literature_prompt,
    # CorDA's and Astra's; they also cut prose such as "Response time", and 1 of the 1,319 gold solutions.
    stops=("Instruction:", "Instruction", "Response:", "Response"),
    max_new_tokens=1024,
    grade=lambda output, problem, protocol: grade(output, problem.reference, protocol),
)
