"""Score a model on benchmarks."""

from collections.abc import Mapping
from pathlib import Path

from eval.tasks.base import Problem
from launch.config.schema import Eval
from launch.models.identity import hash_tokenizer
from launch.run.provenance import name_dtype
from launch.run.results import Score
from launch.runtime.distributed import run_on_rank0
from launch.scoring.score import score_benchmarks
from launch.stages.records import PreparedRun, RunModel


def score_run(
    run: PreparedRun,
    loaded: RunModel,
    problems: Mapping[str, list[Problem]],
    settings: Eval,
    adapter: str | None,
    folder: Path,
) -> dict[str, Score]:
    """Score the model, as it is, on benchmarks. Collective.

    Args:
        problems: benchmark -> its questions; a task with a head has none, since it writes no answers.
        adapter: label of what is scored; kept responses with another label are not reused.
        folder: where responses are kept.
    """
    if not problems:
        return {}
    tokenizer = run_on_rank0(lambda: hash_tokenizer(run.inputs.model_path, with_config=False))
    identity = {
        "base": run.inputs.base | {"tokenizer_sha256": tokenizer},
        "adapter": adapter,
        "dtype": name_dtype(run.inputs.dtype),
    }
    return score_benchmarks(
        loaded.engine, loaded.model, run.tokenizer, problems, settings, folder, identity
    )
