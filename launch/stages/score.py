"""Score a model on the benchmarks of its recipe.

"Collective" in a docstring means that every rank must call the function, in the same order.
"""

from pathlib import Path

from launch.models.identity import hash_tokenizer_files
from launch.run.provenance import dtype_name
from launch.run.results import Score
from launch.runtime import watchdog
from launch.runtime.distributed import run_on_rank0
from launch.scoring.score import score_benchmarks
from launch.stages.records import PreparedRun, RunModel


def score_run(
    run: PreparedRun, loaded: RunModel, phase: str, adapter: str | None, folder: Path
) -> dict[str, Score]:
    """Score the model, as it is, on the recipe's benchmarks. Collective.

    Args:
        phase: the watchdog's name for it.
        adapter: label of what is scored; kept responses with another label are not reused.
        folder: where responses are kept.
    """
    watchdog.set_phase(phase, timed=True)
    if run.recipe.task.has_head:  # it writes no answers
        return {}
    tokenizer = run_on_rank0(lambda: hash_tokenizer_files(run.inputs.model_path))
    identity = {
        "base": run.inputs.base | {"tokenizer_sha256": tokenizer},
        "adapter": adapter,
        "dtype": dtype_name(run.inputs.dtype),
    }
    return score_benchmarks(
        loaded.engine,
        loaded.model,
        run.tokenizer,
        run.problems,
        run.recipe.eval,
        folder,
        identity,
    )
