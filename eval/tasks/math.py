r"""MATH: competition problems with a LaTeX answer (Hendrycks et al. 2021; 5,000 test problems, or the 500 of MATH-500).

A row: {"problem": ..., "solution": "... $\boxed{2}$ ..."} and, in MATH-500, {"answer": "2"}. The two sets are two
suites, `math` and `math500`, whose numbers are not compared.
"""

import re
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

from eval.equivalence import equivalent
from eval.errors import EvalError
from eval.tasks import gsm8k
from eval.tasks.base import Grader, Problem, Suite
from eval.tasks.loading import Source, read, text

SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
    *("number_theory", "prealgebra", "precalculus"),
)
FILES = ("math_test.jsonl", "math/test.jsonl", "math_test_1000.jsonl")
SOURCES = {
    "math": Source("math", FILES, "EleutherAI/hendrycks_math", SUBJECTS, "test"),
    "math500": Source(
        "math500",
        ("math500_test.jsonl", "math500/test.jsonl"),
        "HuggingFaceH4/MATH-500",
        None,
        "test",
    ),
}
MAX_LENGTH = 2000  # characters; longer answers are no answers
_MARKER = re.compile(r"(?:final\s+)?answer\s*(?:is\b\s*:?|:)", re.IGNORECASE)
_UNITS = r"(?:cm|mm|km|m|in|ft|inch(?:es)?|feet|miles?|degrees?|units?|dollars?|cents?|hours?|minutes?|seconds?)"


def rows(suite: str, data_dir: Path | None, limit: int | None = None) -> list[Problem]:
    """The first `limit` problems of `math` or `math500`. Raises EvalError for a row without an answer."""
    source = SOURCES[suite]
    problems = []
    for number, row in enumerate(islice(read(source, data_dir), limit), start=1):
        question = text(row, "problem", source, number)
        reference = row.get("answer")
        if not isinstance(reference, str):
            reference = last_boxed(text(row, "solution", source, number))
        if not reference:
            raise EvalError(
                f"{suite}: row {number} has neither an answer nor a \\boxed{{}} in its solution"
            )
        problems.append(Problem(f"{suite}/{number - 1}", question, reference))
    return problems


def last_boxed(output: str) -> str | None:
    r"""What is in the last \boxed{} or \fbox{} of `output`, braces matched; None if there is none or it is cut off."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*(?=\{)", output))):
        return _braced(output[match.end() :])
    single = re.findall(r"\\boxed\s+([^\s${}\\]+)", output)
    return single[-1].rstrip(".,") if single else None


def _braced(text: str) -> str | None:
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:i]
    return None


def grade(output: str, reference: str, protocol: Grader = "strict") -> bool:
    r"""Whether `output` gives LaTeX `reference` as its final answer. Never raises; ends within 10 s.

    strict: the answer is what follows the last "answer is" or "answer:", a box in it first, else the last \boxed{}.
    It is right if it is the reference to the letter once markup is dropped, or if math-verify takes it for the same.

    literature: MetaMath's rule (and PiSSA's): what follows the last "The answer is: ", up to ".\n", and the reference
    are the same text after Hendrycks' normalisation; so 0.75 is not \frac{3}{4}, and \pi/3 is not \frac{\pi}{3}.
    """
    if protocol == "literature":
        return _literature(output, reference)
    answer = extract(output)
    if answer is None or len(answer) > MAX_LENGTH:
        return False
    answer, wanted = clean(answer), clean(reference)
    if not answer or not wanted:
        return False
    if _letters(answer) == _letters(wanted):
        return True
    if _depth(answer) > 50 or not _comparable(answer, wanted):
        return False
    return equivalent(answer, wanted)


def extract(output: str) -> str | None:
    """The final answer that `output` states, or None."""
    markers = list(_MARKER.finditer(output))
    for marker in reversed(markers):
        after = output[marker.end() :].strip()
        if after:
            boxed = last_boxed(after.partition("\n\n")[0]) if "boxed" in after else None
            return boxed or _statement(after)
    return last_boxed(output)


def _statement(text: str) -> str:
    """`text` up to the end of its first line or sentence, outside of braces."""
    depth = 0
    for i, character in enumerate(text[: MAX_LENGTH + 1]):
        depth += (character == "{") - (character == "}")
        if depth <= 0 and (character == "\n" or re.match(r"\.\s", text[i : i + 2])):
            return text[:i]
    return text


def clean(answer: str) -> str:
    """`answer` without what markup and units add to it."""
    answer = answer.strip().rstrip(".").strip()
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if (
            answer.startswith(left)
            and answer.endswith(right)
            and len(answer) > len(left) + len(right) - 1
        ):
            answer = answer[len(left) : len(answer) - len(right)].strip().rstrip(".").strip()
    answer = (
        answer.replace("\u2212", "-")
        .replace("{,}", ",")
        .replace(r"\!", "")
        .replace(r"\$", "")
        .replace("^\\circ", "")
    )
    answer = (
        answer.replace("^{\\circ}", "")
        .replace(r"\left", "")
        .replace(r"\right", "")
        .replace(r"\%", "")
        .replace("%", "")
    )
    answer = re.sub(r"\\[dt]frac", r"\\frac", answer)
    answer = re.sub(
        r"(?<![\d,])(\d{1,3}(?:,\d{3})+)(?![\d,])", lambda m: m[1].replace(",", ""), answer
    )
    answer = re.sub(
        rf"(?<=[\d}}])\s*\\?(?:\\(?:text|mbox|mathrm)\s*{{\s*[^{{}}]*}}|{_UNITS}\b)(?:\s*\^\s*{{?\d}}?)?\.?$",
        "",
        answer,
    )
    answer = re.sub(r"(\d)\s*\\frac\s*{(\d+)}\s*{(\d+)}", _mixed, answer)
    if _comparable_prefix(answer):
        answer = re.sub(
            r"^\s*(?:[a-zA-Z](?:\([a-z]\))?\s*=|[a-zA-Z]\s*\\in(?![a-z]))\s*", "", answer
        )
    return answer.strip()


def _comparable_prefix(answer: str) -> bool:
    """Whether `answer` is a value after a name (x = 5), and not an equation that is the answer itself (y = 2x + 3)."""
    name, equals, value = answer.partition("=")
    if not equals:
        return True
    return "=" not in value and (
        not re.search(r"(?<!\\)(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z])", value) or "(" in name
    )


def _mixed(match: re.Match) -> str:
    whole, top, bottom = (int(group) for group in match.groups())
    return rf"\frac{{{whole * bottom + top}}}{{{bottom}}}"


def _letters(answer: str) -> str:
    answer = re.sub(r"\\(?:text|mbox|mathrm|mathbf|textbf)\s*{([^{}]*)}", r"\1", answer)
    answer = re.sub(r"\\[,;: ]|~|\s|\\displaystyle", "", answer)
    answer = re.sub(r"_{(\w)}", r"_\1", answer)
    return re.sub(r"\^{(\w)}", r"^\1", answer)


def _depth(answer: str) -> int:
    deepest = depth = 0
    for character in answer:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _comparable(answer: str, wanted: str) -> bool:
    """False where math-verify would be too kind: a word that is another word, a number in another base."""
    words = [
        re.fullmatch(r"\s*\\(?:text|mbox|mathrm)\s*{.*}\s*", side) for side in (answer, wanted)
    ]
    bases = [re.search(r"\d_{?\d", side) for side in (answer, wanted)]
    return not any(words) and bool(bases[0]) == bool(bases[1]) and not any(bases)


def _literature(output: str, reference: str) -> bool:
    _, marker, after = output.rpartition("The answer is: ")
    if not marker:
        return False
    answer = after.partition(".\n")[0].strip()
    return _hendrycks(answer.removesuffix(".")) == _hendrycks(reference)


def _hendrycks(answer: str) -> str:
    """Hendrycks et al.'s normalisation, by its effects; an answer that it would fail on stays as it is."""
    text = answer.replace("\n", "").replace(r"\!", "").replace("\\\\", "\\")
    text = (
        text.replace("tfrac", "frac")
        .replace("dfrac", "frac")
        .replace(r"\left", "")
        .replace(r"\right", "")
    )
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


def _suite(name: str) -> Suite:
    read_rows: Callable = partial(rows, name)
    return Suite(
        name=name,
        kind="answer",
        rows=read_rows,
        literature_prompt=gsm8k.literature_prompt,
        stops=gsm8k.SUITE.stops,
        max_new_tokens=2048,
        grade=lambda output, problem, protocol: grade(output, problem.reference, protocol),
    )


SUITES = [_suite(name) for name in SOURCES]
