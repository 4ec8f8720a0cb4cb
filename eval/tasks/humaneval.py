"""HumanEval: 164 Python functions to write from a signature and docstring (Chen et al. 2021).

A row: {"task_id": "HumanEval/0", "prompt": "def f(...):\\n    \\"\\"\\"...", "entry_point": "f",
"canonical_solution": "    ...", "test": "def check(candidate): ..."}. The program in a response
runs in eval.sandbox, apart from its tests.
"""

from itertools import islice
from pathlib import Path

from eval.tasks.base import ALPACA_PROMPT, Benchmark, CodeTests, Grader, Problem
from eval.tasks.code import extract_program, extract_program_literature
from eval.tasks.loading import Source, read_rows, read_text_field

FILES = ("humaneval.jsonl", "HumanEval.jsonl", "HumanEval.jsonl.gz", "humaneval/test.jsonl")
SOURCE = Source("humaneval", FILES, "openai/openai_humaneval", None, "test")
_FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")


def read_problems(data_dir: Path | None, limit: int | None = None) -> list[Problem]:
    """Read the first `limit` problems; see eval.tasks.loading.read_rows.

    Raises:
        EvalError: a row lacks a field.
    """
    problems = []
    for number, row in enumerate(islice(read_rows(SOURCE, data_dir), limit), start=1):
        fields = [read_text_field(row, field, SOURCE, number) for field in _FIELDS]
        task_id, prompt, entry_point, solution, check = fields
        tests: CodeTests = {
            "entry_point": entry_point,
            "setup": f"{prompt}\n    pass\n",  # three tests call helpers that the prompt defines
            "tests": f"{check}\ncheck({entry_point})\n",
            "prompt": prompt,
            "in_box": False,
        }
        question = f"Create a Python script for this problem:\n{prompt}"
        problems.append(Problem(task_id, question, prompt + solution, tests, prompt))
    return problems


def _extract_program(output: str, problem: Problem, grader: Grader) -> str:
    prompt = problem.tests["prompt"]
    if grader == "literature":
        return extract_program_literature(output, prompt)
    return extract_program(output, problem.tests["entry_point"], prompt)


def format_wizardcoder_prompt(question: str) -> str:
    """Return WizardCoder's prompt, which is the same for HumanEval and MBPP."""
    return ALPACA_PROMPT.format(instruction=question)


BENCHMARKS = (
    Benchmark(
        name="humaneval",
        kind="code",
        num_problems=164,
        read_problems=read_problems,
        format_literature_prompt=format_wizardcoder_prompt,
        stops=(),
        max_new_tokens=1024,
        extract_program=_extract_program,
    ),
)
