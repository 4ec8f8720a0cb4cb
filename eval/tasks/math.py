r"""MATH: competition problems with a LaTeX answer (Hendrycks et al. 2021).

Two benchmarks, whose numbers are not compared: `math` has the 5,000 test problems, `math500` the
500 of MATH-500. A row: {"problem": ..., "solution": "... $\boxed{2}$ ..."}; MATH-500 adds
{"answer": "2"}.
"""

import re
from functools import partial
from itertools import islice
from pathlib import Path

from eval.equivalence import are_equivalent
from eval.errors import EvalError
from eval.tasks.base import Benchmark, Grader, Problem
from eval.tasks.gsm8k import STOPS, format_metamath_prompt
from eval.tasks.loading import Source, read_rows, read_text_field

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
MATH_FILES = ("math_test.jsonl", "math/test.jsonl", "math_test_1000.jsonl")
MATH500_FILES = ("math500_test.jsonl", "math500/test.jsonl")
SOURCES = {
    "math": Source("math", MATH_FILES, "EleutherAI/hendrycks_math", SUBJECTS, "test"),
    "math500": Source("math500", MATH500_FILES, "HuggingFaceH4/MATH-500", None, "test"),
}
MAX_LENGTH = 2000  # characters; a longer answer is no answer
MAX_DEPTH = 50  # nested brackets that math-verify is given

# What comes before a stated final answer. The last one in a response counts.
_MARKER = re.compile(r"(?:final\s+)?answer\s*(?:is\b\s*:?|:)", re.IGNORECASE)
_UNITS = (
    r"(?:cm|mm|km|m|in|ft|inch(?:es)?|feet|miles?|degrees?|units?|dollars?|cents?"
    r"|hours?|minutes?|seconds?)"
)
# A unit after a digit or a brace: "5 cm^2", "5\text{ apples}", "\frac{1}{2} hour".
_TRAILING_UNIT = re.compile(
    rf"(?<=[\d}}])\s*\\?(?:\\(?:text|mbox|mathrm)\s*{{\s*[^{{}}]*}}|{_UNITS}\b)"
    r"(?:\s*\^\s*{?\d}?)?\.?$"
)
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
# Replaced in this order: \% before the bare sign.
_MARKUP = {
    "\u2212": "-",
    "{,}": ",",
    r"\!": "",
    r"\$": "",
    r"^\circ": "",
    r"^{\circ}": "",
    r"\left": "",
    r"\right": "",
    r"\%": "",
    "%": "",
}


def read_problems(benchmark: str, data_dir: Path | None, limit: int | None = None) -> list[Problem]:
    """Read the first `limit` problems of `math` or `math500`; see eval.tasks.loading.read_rows.

    Raises:
        EvalError: a row has no answer.
    """
    source = SOURCES[benchmark]
    problems = []
    for number, row in enumerate(islice(read_rows(source, data_dir), limit), start=1):
        question = read_text_field(row, "problem", source, number)
        reference = row.get("answer")
        if not isinstance(reference, str):
            reference = find_last_box(read_text_field(row, "solution", source, number))
        if not reference:
            raise EvalError(
                f"{benchmark}: row {number} has neither an answer nor a \\boxed{{}} in its solution"
            )
        problems.append(Problem(f"{benchmark}/{number - 1}", question, reference))
    return problems


def find_last_box(output: str) -> str | None:
    r"""Return the content of the last \boxed{} or \fbox{} in `output`, with its braces matched.

    Returns None if there is none, or if the last one is cut off.
    """
    boxes = list(re.finditer(r"\\(?:boxed|fbox)\s*(?=\{)", output))
    if boxes:
        return _read_braces(output[boxes[-1].end() :])
    # LaTeX takes one character or word without braces: \boxed 5.
    single = re.findall(r"\\boxed\s+([^\s${}\\]+)", output)
    return single[-1].rstrip(".,") if single else None


def _read_braces(text: str) -> str | None:
    """Return what the brace at the start of `text` encloses, or None if it is never closed."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:i]
    return None


def grade_answer(output: str, reference: str, grader: Grader = "strict") -> bool:
    r"""Return whether `output` gives LaTeX `reference` as its final answer.

    Never raises, and ends within 10 s.

    strict: the answer is the text after the last "answer is" or "answer:", or a box in that text,
    else the last \boxed{}. It is right if it is the same text as the reference after markup is
    dropped, or if math-verify finds the two equivalent.

    literature: MetaMath's rule (and PiSSA's). The text after the last "The answer is: ", up to
    ".\n", and the reference are the same after Hendrycks' normalisation. So 0.75 is not
    \frac{3}{4}, and \pi/3 is not \frac{\pi}{3}.
    """
    if grader == "literature":
        return _grade_literature(output, reference)
    answer = extract_answer(output)
    if answer is None or len(answer) > MAX_LENGTH:
        return False
    answer, wanted = clean_answer(answer), clean_answer(reference)
    if not answer or not wanted:
        return False
    if _drop_spacing(answer) == _drop_spacing(wanted):
        return True
    # math-verify's parser is recursive, so it does not get deep nesting.
    if _count_nesting(answer) > MAX_DEPTH or not _can_compare(answer, wanted):
        return False
    return are_equivalent(answer, wanted)


def extract_answer(output: str) -> str | None:
    """Return the final answer that `output` states, or None."""
    for marker in reversed(list(_MARKER.finditer(output))):
        after = output[marker.end() :].strip()
        if after:
            # A box further down belongs to something else.
            boxed = find_last_box(after.partition("\n\n")[0]) if "boxed" in after else None
            return boxed or _read_statement(after)
    return find_last_box(output)


def _read_statement(text: str) -> str:
    """Return `text` up to the end of its first line or sentence outside of braces."""
    depth = 0
    for i, character in enumerate(text[: MAX_LENGTH + 1]):
        depth += (character == "{") - (character == "}")
        if depth <= 0 and (character == "\n" or re.match(r"\.\s", text[i : i + 2])):
            return text[:i]
    return text


def clean_answer(answer: str) -> str:
    """Return `answer` without markup, thousands separators, units and the name before a value."""
    answer = answer.strip().rstrip(".").strip()
    for left, right in _DELIMITERS:
        is_longer = len(answer) > len(left) + len(right) - 1
        if is_longer and answer.startswith(left) and answer.endswith(right):
            answer = answer[len(left) : len(answer) - len(right)].strip().rstrip(".").strip()
    for markup, replacement in _MARKUP.items():
        answer = answer.replace(markup, replacement)
    answer = re.sub(r"\\[dt]frac", r"\\frac", answer)
    # Commas only between groups of three digits: "1,2" is two solutions.
    answer = re.sub(r"(?<![\d,])(\d{1,3}(?:,\d{3})+)(?![\d,])", _drop_commas, answer)
    answer = _TRAILING_UNIT.sub("", answer)
    answer = re.sub(r"(\d)\s*\\frac\s*{(\d+)}\s*{(\d+)}", _join_mixed_number, answer)
    if _is_value(answer):
        # "x = 5", "f(x) = 5" and "x \in [1, 2]" are stated by their value.
        name = r"^\s*(?:[a-zA-Z](?:\([a-z]\))?\s*=|[a-zA-Z]\s*\\in(?![a-z]))\s*"
        answer = re.sub(name, "", answer)
    return answer.strip()


def _drop_commas(match: re.Match) -> str:
    return match[1].replace(",", "")


def _join_mixed_number(match: re.Match) -> str:
    whole, top, bottom = (int(group) for group in match.groups())
    return rf"\frac{{{whole * bottom + top}}}{{{bottom}}}"


def _is_value(answer: str) -> bool:
    """Return whether `answer` is a value, named (x = 5) or not.

    An equation that is itself the answer (y = 2x + 3) is not a value.
    """
    name, equals, value = answer.partition("=")
    if not equals:
        return True
    has_variable = re.search(r"(?<!\\)(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z])", value)
    return "=" not in value and (not has_variable or "(" in name)


def _drop_spacing(answer: str) -> str:
    """Return `answer` without spaces, text commands and the braces of one-letter indices."""
    answer = re.sub(r"\\(?:text|mbox|mathrm|mathbf|textbf)\s*{([^{}]*)}", r"\1", answer)
    answer = re.sub(r"\\[,;: ]|~|\s|\\displaystyle", "", answer)
    answer = re.sub(r"_{(\w)}", r"_\1", answer)
    return re.sub(r"\^{(\w)}", r"^\1", answer)


def _count_nesting(answer: str) -> int:
    """Return the depth of the deepest bracket in `answer`."""
    deepest = depth = 0
    for character in answer:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _can_compare(answer: str, wanted: str) -> bool:
    """Return False where math-verify accepts too much: text, and numbers in another base."""
    for side in (answer, wanted):
        is_text = re.fullmatch(r"\s*\\(?:text|mbox|mathrm)\s*{.*}\s*", side)
        has_base = re.search(r"\d_{?\d", side)
        if is_text or has_base:
            return False
    return True


def _grade_literature(output: str, reference: str) -> bool:
    _, marker, after = output.rpartition("The answer is: ")
    if not marker:
        return False
    answer = after.partition(".\n")[0].strip()
    return _normalise_hendrycks(answer.removesuffix(".")) == _normalise_hendrycks(reference)


def _normalise_hendrycks(answer: str) -> str:
    """Normalise `answer` as Hendrycks et al. do, and keep an answer that their code fails on."""
    text = answer.replace("\n", "").replace(r"\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    text = text.replace(r"\left", "").replace(r"\right", "")
    text = text.replace(r"^{\circ}", "").replace(r"^\circ", "").replace(r"\$", "")
    if text.count("\\text{ ") == 1:  # a unit on the right
        text = text.partition("\\text{ ")[0]
    text = text.replace(r"\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = "0" + text if text[0] == "." else text
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= 2:
        text = value
    text = re.sub(r"\\sqrt(?!{)(.)", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac(?!{)(.)(?!{)(.)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(?!{)(.)(?={)", r"\\frac{\1}", text)
    if text == "0.5":
        text = r"\frac{1}{2}"
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", text)


def _make_benchmark(name: str) -> Benchmark:
    return Benchmark(
        name=name,
        kind="answer",
        read_problems=partial(read_problems, name),
        format_literature_prompt=format_metamath_prompt,
        stops=STOPS,
        max_new_tokens=2048,
        grade=lambda output, problem, grader: grade_answer(output, problem.reference, grader),
    )


BENCHMARKS = tuple(_make_benchmark(name) for name in SOURCES)
