r"""GSM8K: grade-school word problems with a numeric answer (1,319 test problems, openai/gsm8k).

A row: {"question": "Janet's ducks lay 16 eggs ...", "answer": "She sells 16 - 3 - 4 = ... \n#### 18"}.
Zero-shot, greedy, in the training prompt; the model writes "The answer is: 18" as MetaMathQA taught it.
"""

import json
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from eval.errors import EvalError

HUB_ID, HUB_CONFIG, HUB_REVISION = "openai/gsm8k", "main", "main"
FILES = ("gsm8k_test.jsonl", "gsm8k/test.jsonl")  # where a data folder may hold the problems

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


class Problem(NamedTuple):
    """One problem and its bare final answer."""

    question: str
    reference: str


def rows(data_dir: Path | None, limit: int | None = None) -> list[Problem]:
    """The first `limit` problems, of the files in `data_dir`, or of the hub.

    Raises:
        EvalError: no file, or a row that is not a problem; the message names it.
    """
    problems = []
    for number, row in enumerate(_read(data_dir), start=1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "answer")):
            raise EvalError(f"gsm8k: row {number} of {data_dir or HUB_ID} needs the text fields question and answer")
        _, marker, reference = row["answer"].rpartition("####")
        if not marker or _value(reference) is None:
            raise EvalError(f"gsm8k: the answer of row {number} of {data_dir or HUB_ID} has no number after ####")
        problems.append(Problem(row["question"], reference.strip()))
        if len(problems) == limit:
            break
    if not problems:
        raise EvalError(f"gsm8k: no problems in {data_dir or HUB_ID}")
    return problems


def _read(data_dir: Path | None) -> Iterator[dict]:
    if data_dir is None:
        import datasets

        try:
            yield from datasets.load_dataset(HUB_ID, HUB_CONFIG, split="test", revision=HUB_REVISION)
        except OSError as error:
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            raise EvalError(f"gsm8k: cannot get {HUB_ID} from the hub ({reason}); give a folder as data_dir") from None
        return
    path = next((data_dir / name for name in FILES if (data_dir / name).is_file()), None)
    if path is None:
        raise EvalError(f"gsm8k: {data_dir} has none of {', '.join(FILES)}")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:  # also what is not UTF-8, or too deep or long to read
                raise EvalError(f"gsm8k: line {number} of {path} is not JSON: {error}") from None


def grade(output: str, reference: str) -> bool:
    """Whether `output` gives the number `reference` as its one final answer. Exact rational arithmetic, no rounding.

    The answer is what follows the last "answer is", "answer:" or "####" that anything follows, else the last \\boxed{},
    else an output that is nothing but a number. Currency and percent signs, units, thousands separators and markup are
    dropped; of an equation the side that is one number counts; two different numbers ("18 or 20") are no answer.
    Never raises.
    """
    wanted = _value(reference)
    answer = extract(output)
    return answer is not None and wanted is not None and answer == wanted


def extract(output: str) -> Fraction | None:
    """The final answer that `output` gives, or None if it gives none or several."""
    markers = list(_MARKER.finditer(output))
    boxes = _BOXED.findall(output)
    if markers:
        text = next((after for marker in reversed(markers) if (after := output[marker.end() :].strip())), "")
        boxes = _BOXED.findall(text)
        if boxes and not re.search(r"\d", text.partition("\\boxed")[0]):
            text = boxes[0]
    elif boxes:
        text = boxes[-1]
    elif len(output) <= MAX_DIGITS and re.fullmatch(r"[^\w\s]?\s*-?[\d.,/ ]+[^\w\s]?", output.strip()):
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
    text = re.split(r"\.(?:\s|$)|[;!?]|,\s+(?=[A-Za-z])|\b(?:because|since|as)\b", text, maxsplit=1)[0]
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
