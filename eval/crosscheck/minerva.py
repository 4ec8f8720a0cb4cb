"""lm-eval's two graders of MATH (its minerva_math tasks), on our rows; task files name it."""

from lm_eval.tasks.minerva_math import utils


def process_results(doc: dict, results: list[str]) -> dict[str, int]:
    """{exact_match, math_verify}; the first wants "Final Answer: The final answer is ... . I hope it is correct."."""
    answer = utils.normalize_final_answer(doc["reference"])
    return utils.process_results(
        {"solution": f"$\\boxed{{{doc['reference']}}}$", "answer": answer}, results
    )
