"""HumanEval: 164 Python functions to be written from a signature and docstring (Chen et al. 2021).

A row: {"task_id": "HumanEval/0", "prompt": "def f(...):\\n    \\"\\"\\"...", "entry_point": "f", "canonical_solution":
"    ...", "test": "def check(candidate): ..."}. The response's program runs in eval.sandbox, apart from its tests.
"""

from itertools import islice
from pathlib import Path

from eval.tasks import code as program
from eval.tasks.base import ALPACA, Grader, Problem, Suite
from eval.tasks.loading import Source, read, text

FILES = ("humaneval.jsonl", "HumanEval.jsonl", "HumanEval.jsonl.gz", "humaneval/test.jsonl")
SOURCE = Source("humaneval", FILES, "openai/openai_humaneval", None, "test")


def rows(data_dir: Path | None, limit: int | None = None) -> list[Problem]:
    """The first `limit` problems. Raises EvalError for a row that is not one."""
    problems = []
    for number, row in enumerate(islice(read(SOURCE, data_dir), limit), start=1):
        fields = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
        task_id, prompt, name, solution, tests = (
            text(row, field, SOURCE, number) for field in fields
        )
        code = {
            "entry_point": name,
            "setup": f"{prompt}\n    pass\n",  # three tests call helpers that the prompt defines
            "tests": f"{tests}\ncheck({name})\n",
            "prompt": prompt,
            "in_box": False,
        }
        question = f"Create a Python script for this problem:\n{prompt}"
        problems.append(Problem(task_id, question, prompt + solution, code, prompt))
    return problems


def to_program(output: str, problem: Problem, protocol: Grader) -> str:
    """The program in `output` that is run."""
    prompt = problem.tests["prompt"]
    if protocol == "literature":
        return program.literature(output, prompt)
    return program.strict(output, problem.tests["entry_point"], prompt)


SUITE = Suite(
    name="humaneval",
    kind="code",
    rows=rows,
    literature_prompt=lambda question: ALPACA.format(instruction=question),  # WizardCoder's
    stops=(),
    max_new_tokens=1024,
    to_program=to_program,
)
