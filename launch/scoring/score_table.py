"""Render scores as a table; below it, what is wrong with prompts and responses."""

from collections.abc import Mapping, Sequence

from eval.statistics import mean_interval
from eval.tasks import expand_groups
from launch.run.results import Score

MAX_IDS = 10  # of problems whose prompts are too long, that a line names


def render_scores(scores: Mapping[str, Score]) -> str:
    """Render scores as a Markdown table, one row a benchmark, accuracies in percent.

    Where all eight commonsense benchmarks are there, a last row has their unweighted mean. Below
    the table stand the problems whose prompts were too long, and the numbers of responses without
    an answer, and of those cut off.
    """
    lines = [
        "| suite | strict (%) | 95 % interval | literature (%) | n | prompt |",
        "|---|---|---|---|---|---|",
    ]
    for name, score in scores.items():
        low, high = score.interval
        lines.append(
            f"| {name} | {100 * score.accuracy:.1f} | {100 * low:.1f} to {100 * high:.1f} | "
            f"{100 * score.literature.accuracy:.1f} | {score.n} | {score.prompt} |"
        )
        for k, value in (score.pass_at or {}).items():
            lines.append(
                f"| {name} pass@{k} | {100 * value:.1f} | | | {score.n} | {score.prompt} |"
            )
    # LLM-Adapters and later papers quote this mean.
    commonsense = expand_groups(["commonsense"])
    if all(name in scores for name in commonsense):
        strict = [scores[name].accuracy for name in commonsense]
        literature = [scores[name].literature.accuracy for name in commonsense]
        low, high = mean_interval(strict, [scores[name].interval for name in commonsense])
        lines.append(
            f"| mean of the eight | {100 * (sum(strict) / 8):.1f} | {100 * low:.1f} to "
            f"{100 * high:.1f} | {100 * (sum(literature) / 8):.1f} | | |"
        )
    for name, score in scores.items():
        if score.overlong:
            lines.append(f"\n{_describe_overlong(name, score.overlong)}")
        if score.no_answer or score.literature.no_answer:
            lines.append(
                f"\n{name}: no answer found in {score.no_answer or 0} responses (strict) and "
                f"{score.literature.no_answer or 0} (literature), which count as wrong"
            )
        if score.truncated:
            lines.append(
                f"\n{name}: {score.truncated} responses were cut off before their end, by the "
                "limit of new tokens or of the context"
            )
    return "\n".join(lines)


def _describe_overlong(name: str, ids: Sequence[str]) -> str:
    named = ", ".join(ids[:MAX_IDS]) + (", ..." if len(ids) > MAX_IDS else "")
    return (
        f"{name}: the prompts of {len(ids)} problems are too long for the model, so they have an "
        f"empty response: {named}"
    )
