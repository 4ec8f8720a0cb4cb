"""Export what was trained."""

import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from astra.adapter import Factors
from launch.config.schema import Export
from launch.data.batches import make_model_inputs
from launch.data.chat.template import load_template
from launch.models.files import load_tokenizer
from launch.run.metrics import Metrics
from launch.run.plots import plot_runs
from launch.run.results import SmallExport
from launch.runtime import watchdog
from launch.runtime.distributed import run_on_rank0, try_or_say
from launch.scoring.held_out import measure_predictions
from launch.stages.records import PreparedRun, RunModel
from launch.training import small_export
from launch.training.chat_files import write_chat_files
from launch.training.loss import has_bf16_products
from launch.training.merged_export import remove_merged, save_merged
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
    run_on_rank0(lambda: remove_unwanted(run.folder, run.recipe.export))
    exported = export_trained(run.folder, loaded.model, loaded.engine, run.inputs, initial)
    if run.recipe.export.merged:
        save_merged(run.folder, loaded.model, loaded.engine, run.inputs)
    run_on_rank0(lambda: _add_chat_files(run, "model", "lora", "adapter", "merged"))
    # Nothing depends on the plots: the run is not to fail for them after its training.
    run_on_rank0(
        lambda: try_or_say("the plots", lambda: plot_runs({run.folder.name: history}, run.folder))
    )
    return exported


def _add_chat_files(run: PreparedRun, *names: str) -> None:
    """Write a chat template and the ends of an answer into what was exported. Rank 0 calls it.

    Nothing is written for runs on other rows than messages.
    """
    if not run.recipe.data.is_chat:
        return
    base = run.inputs.model_path
    template = load_template(run.recipe.data.chat_template, load_tokenizer(base))
    for name in names:
        if (run.folder / name).is_dir():
            write_chat_files(run.folder / name, base, template)


def remove_unwanted(folder: Path, wanted: Export) -> None:
    """Remove what an earlier start exported and `export` no longer asks for. Rank 0 calls it."""
    if wanted.rank is None and (folder / small_export.FOLDER).is_dir():
        shutil.rmtree(folder / small_export.FOLDER)
    if not wanted.merged:
        remove_merged(folder)


def export_small(
    run: PreparedRun, loaded: RunModel, initial: dict[str, Factors]
) -> SmallExport | None:
    """Write lora_small/ if the recipe asks for it, and measure its held-out loss. Collective."""
    if run.recipe.export.rank is None:
        return None
    watchdog.set_phase("exporting lora_small")
    held_out = {name: tokens for name, tokens in run.measured.items() if name == "held_out"}
    small, dropped = save_small_lora(
        run.folder,
        loaded.model,
        loaded.engine,
        run.inputs,
        initial,
        run.recipe.export.rank,
        keep_dropped=bool(held_out),
    )
    run_on_rank0(lambda: _add_chat_files(run, small_export.FOLDER))
    if held_out:
        with without_products(loaded.lora_layers, dropped, loaded.engine.device):
            measured = measure_predictions(loaded.engine, loaded.model, held_out)
        small = small.model_copy(update=measured)
    return small


@torch.no_grad()
def rehearse_small(
    run: PreparedRun, loaded: RunModel, initial: dict[str, Factors], folder: Path
) -> None:
    """Try what `export_small` does, with one module and, at most, a row on each rank. Collective.

    To be called in training, within `in_bf16`. The model is left in training mode.
    """
    model, device, held_out = loaded.model, loaded.engine.device, run.measured.get("held_out")
    _, dropped = save_small_lora(
        folder,
        model,
        loaded.engine,
        run.inputs,
        initial,
        run.recipe.export.rank,
        keep_dropped=held_out is not None,
        rehearsal=True,
    )
    # Compiled layers would be compiled once more for it.
    if held_out is None or run.recipe.train.compile:
        return
    inputs = make_model_inputs(held_out, [dist.get_rank() % len(held_out)], device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=has_bf16_products(model))
    model.eval()
    with without_products(loaded.lora_layers, dropped, device), autocast:
        model(**inputs)
    model.train()
