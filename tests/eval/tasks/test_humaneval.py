"""HumanEval's problems are read whole, and their references are found in a response.

Needs the shared HumanEval. A second.
"""

from pathlib import Path

from eval.tasks.code import extract_program
from eval.tasks.humaneval import read_problems


def test_the_real_problems(shared: Path) -> None:
    problems = read_problems(shared / "data")
    assert (len(problems), problems[0].id) == (164, "HumanEval/0")
    for problem in problems:  # written as a whole, fenced
        output = f"```python\n{problem.reference}\n```"
        entry_point = problem.tests["entry_point"]
        assert entry_point in extract_program(output, entry_point)
