"""Compare two finished evaluations, problem by problem. Needs no model."""

from pathlib import Path

from eval.compare import compare_responses, list_uncompared, render_comparison
from launch.runtime.errors import UserError
from launch.scoring.responses import GENERATIONS, read_generations


def compare_evaluations(first: Path, second: Path) -> str:
    """Compare the graded responses in two folders of launch/evaluate.py, or of runs.

    Returns:
        The paired differences as a Markdown table, the problems whose grade differs, and the
        benchmarks that are not compared.

    Raises:
        UserError: a folder has no responses.
        EvalError: the two have no graded problem in common.
    """
    responses = []
    for folder in (first, second):
        path = folder / GENERATIONS
        if not path.is_file():
            raise UserError(
                f"--compare: {folder} has no {GENERATIONS}; give folders of launch/evaluate.py "
                "or of runs with eval.suites; launch/report.py has the scores of runs with `task`"
            )
        responses.append(read_generations(path))
    names = (str(first), str(second))
    return render_comparison(compare_responses(*responses), names, list_uncompared(*responses))
