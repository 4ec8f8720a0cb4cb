r"""MATH: competition problems with a LaTeX answer (Hendrycks et al. 2021).

Two benchmarks, whose numbers are not compared: `math` has the 5,000 test problems, `math500` the
500 of MATH-500. A row: {"problem": ..., "solution": "... $\boxed{2}$ ..."}; MATH-500 adds
{"answer": "2"}.
"""

import re
from functools import partial
from itertools import islice
from pathlib import Path

from eval.answers.read import read_answer, read_braces
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
MATH_FILES = ("math_test.jsonl", "math/test.jsonl")
MATH500_FILES = ("math500_test.jsonl", "math500/test.jsonl")
SOURCES = {
    "math": Source("math", MATH_FILES, "EleutherAI/hendrycks_math", SUBJECTS, "test"),
    "math500": Source("math500", MATH500_FILES, "HuggingFaceH4/MATH-500", None, "test"),
}
NUM_PROBLEMS = {"math": 5000, "math500": 500}


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
        return read_braces(output[boxes[-1].end() :])
    # LaTeX takes one character or word without braces: \boxed 5.
    single = re.findall(r"\\boxed\s+([^\s${}\\]+)", output)
    return single[-1].rstrip(".,") if single else None


def grade_answer(output: str, reference: str, grader: Grader = "strict") -> bool:
    r"""Return whether `output` gives LaTeX `reference` as its final answer.

    Never raises, and ends within 10 s of processor time.

    strict: the final answer that eval.answers.read finds, compared exactly by eval.equivalence; the
    rule is in docs/graders.md.

    literature: MetaMath's rule (and PiSSA's). The text after the last "The answer is: ", up to
    ".\n", and the reference are the same after Hendrycks' normalisation. So 0.75 is not
    \frac{3}{4}, and \pi/3 is not \frac{\pi}{3}.
    """
    if grader == "literature":
        return _grade_literature(output, reference)
    answer = read_answer(output)
    return answer is not None and are_equivalent(answer, reference)


def finds_answer(output: str, grader: Grader = "strict") -> bool:
    """Return whether `output` gives an answer at all that `grader` can read. Never raises."""
    if grader == "literature":
        return "The answer is: " in output
    return read_answer(output) is not None


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
        num_problems=NUM_PROBLEMS[name],
        read_problems=partial(read_problems, name),
        format_literature_prompt=format_metamath_prompt,
        stops=STOPS,
        max_new_tokens=2048,
        grade=lambda output, problem, grader: grade_answer(output, problem.reference, grader),
        finds_answer=finds_answer,
    )


BENCHMARKS = tuple(_make_benchmark(name) for name in SOURCES)
