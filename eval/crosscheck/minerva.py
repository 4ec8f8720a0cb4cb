"""lm-eval's two graders of MATH (its minerva_math tasks), for the documents of this repository.

eval.crosscheck.harness copies this file beside the task files that name it.
"""

from lm_eval.tasks.minerva_math import utils


def process_results(doc: dict, results: list[str]) -> dict[str, int]:
    """Return {exact_match, math_verify}.

    exact_match reads only "Final Answer: The final answer is ... . I hope it is correct."
    """
    answer = utils.normalize_final_answer(doc["reference"])
    solution = f"$\\boxed{{{doc['reference']}}}$"
    return utils.process_results({"solution": solution, "answer": answer}, results)
