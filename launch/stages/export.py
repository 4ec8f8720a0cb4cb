"""Export what was trained.

"Collective" in a docstring means that every rank must call the function, in the same order.
"""

from pathlib import Path

from peft.tuners.lora import LoraLayer

from astra.adapter import ADAPTER, Factors
from launch.run.metrics import Metrics
from launch.run.plots import plot_runs
from launch.run.results import SmallExport
from launch.runtime import watchdog
from launch.runtime.distributed import run_on_rank0, try_or_say
from launch.scoring.held_out import measure_predictions
from launch.stages.records import PreparedRun, RunModel
from launch.training.merged_export import save_merged
from launch.training.small_export import save_small_lora, without_products
from launch.training.trainable import export_trained


def export_run(
    run: PreparedRun, loaded: RunModel, initial: dict[str, Factors], history: list[Metrics]
) -> Path:
    """Write what was trained, merged too if asked for, and plots of its training. Collective.

    Returns:
        The folder that users load.
    """
    watchdog.set_phase("exporting")
    exported = export_trained(run.folder, loaded.model, loaded.engine, run.inputs, initial)
    if run.recipe.export.merged:
        save_merged(run.folder, loaded.model, loaded.engine, run.inputs)
    # Nothing depends on the plots: the run is not to fail for them after its training.
    run_on_rank0(
        lambda: try_or_say("the plots", lambda: plot_runs({run.folder.name: history}, run.folder))
    )
    return exported


def export_small(
    run: PreparedRun, loaded: RunModel, initial: dict[str, Factors]
) -> SmallExport | None:
    """Write lora_small/ if the recipe asks for it, and measure its held-out loss. Collective."""
    if run.recipe.export.rank is None:
        return None
    watchdog.set_phase("exporting lora_small")
    held_out = {name: tokens for name, tokens in run.measured.items() if name == "held_out"}
    small, dropped = save_small(
        run, loaded, loaded.lora_layers, initial, run.folder, keep_dropped=bool(held_out)
    )
    if held_out:
        with without_products(loaded.lora_layers, dropped, loaded.engine.device):
            measured = measure_predictions(loaded.engine, loaded.model, held_out)
        small = small.model_copy(update=measured)
    return small


def save_small(
    run: PreparedRun,
    loaded: RunModel,
    layers: dict[str, LoraLayer],
    initial: dict[str, Factors],
    folder: Path,
    keep_dropped: bool,
) -> tuple[SmallExport, dict[str, Factors]]:
    """Write lora_small/ of `layers` into `folder`; see `save_small_lora`. Collective."""
    return save_small_lora(
        folder,
        layers,
        loaded.engine,
        loaded.model.peft_config[ADAPTER],
        run.inputs.base,
        initial,
        run.recipe.export.rank,
        keep_dropped,
    )
