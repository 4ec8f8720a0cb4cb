"""Score a model on the suites that a recipe names: problems, generation, grades, generations.jsonl."""

import json
import time
from pathlib import Path

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from eval.generate import generate
from eval.statistics import wilson
from eval.tasks import TASKS
from launch.data import encode, prompt
from launch.distributed import on_rank0
from launch.engines.base import Engine
from launch.recipe import Eval
from launch.tracking import progress


def read_problems(settings: Eval) -> dict[str, list]:
    """Suite name -> its problems, read on rank 0 and handed to all. Raises UserError. Collective."""
    data_dir = None if settings.data_dir is None else Path(settings.data_dir).expanduser()
    return on_rank0(lambda: {suite: TASKS[suite].rows(data_dir, settings.limit) for suite in settings.suites})


def score(
    engine: Engine,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    problems: dict[str, list],
    settings: Eval,
    folder: Path,
) -> dict[str, dict]:
    """Generate and grade every suite; collective. Rank 0 writes each generation to `folder`/generations.jsonl.

    Returns:
        Suite -> {accuracy (fraction), n, correct, interval (95 % Wilson, fractions), seconds}.
    """
    model.eval()
    scores = {}
    lines = []
    for suite, rows in problems.items():
        start = time.perf_counter()
        outputs = generate(
            model,
            tokenizer,
            encode(tokenizer, [prompt(row.question) for row in rows]),
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            device=engine.device,
            sharded=engine.sharded,
            progress=lambda batches, suite=suite: progress(batches, len(batches), suite, dist.get_rank()),
        )
        grades = [TASKS[suite].grade(output, row.reference) for output, row in zip(outputs, rows, strict=True)]
        correct, n = sum(grades), len(rows)
        scores[suite] = {
            "accuracy": correct / n,
            "n": n,
            "correct": correct,
            "interval": list(wilson(correct, n)),
            "seconds": time.perf_counter() - start,
        }
        for index, (row, output, passed) in enumerate(zip(rows, outputs, grades, strict=True)):
            lines.append({"suite": suite, "index": index, **row._asdict(), "output": output, "correct": passed})
    if dist.get_rank() == 0 and lines:
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / "generations.jsonl").write_text(text, encoding="utf-8")
    return scores


def describe(scores: dict[str, dict]) -> str:
    """One line for each suite: accuracy in percent, its interval and n."""
    return "\n".join(
        f"{suite}: {100 * s['accuracy']:.1f} % (95 % interval {100 * s['interval'][0]:.1f} to "
        f"{100 * s['interval'][1]:.1f}, n = {s['n']})"
        for suite, s in scores.items()
    )
