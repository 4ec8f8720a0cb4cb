"""The main path of a fine-tuning run, from top to bottom: one call for each stage.

"Collective" in a docstring means that every rank must call the function, in the same order.
"""

import contextlib
from pathlib import Path

import torch
import torch.distributed as dist

from astra.adapter import read_factors
from launch.config.schema import Recipe
from launch.run.folder import open_run, write_state
from launch.run.results import RESULTS, render_runs
from launch.runtime import watchdog
from launch.runtime.distributed import (
    print_rank0,
    run_on_rank0,
    start_process_group,
    stop_process_group,
)
from launch.runtime.entry import describe_failure
from launch.runtime.errors import DivergedError, UserError
from launch.runtime.locks import FolderLock
from launch.scoring.held_out import measure_predictions
from launch.stages.export import export_run, export_small
from launch.stages.initialise import initialise_run, load_run_model, restore_run
from launch.stages.next_steps import describe_next_steps
from launch.stages.prepare import prepare_run
from launch.stages.results import make_results, write_run_results
from launch.stages.score import score_run
from launch.stages.score_steps import has_stopped_early, restore_best
from launch.stages.train import save_checkpoint, train_model
from launch.training.flops import find_peak_flops


def fine_tune(
    recipe: Recipe,
    name: str,
    folder: Path,
    stall: float,
    profile: bool = False,
    peak_tflops: float | None = None,
) -> None:
    """Run `recipe` into the run folder. Every rank of a launcher calls it.

    Started again on the same folder, it resumes from the newest whole checkpoint.

    Args:
        name: the recipe's name, for the results.
        stall: seconds without progress after which the run is ended.
        profile: whether to record a few steps (launch.training.profiling).
        peak_tflops: peak TFLOP/s of one device, in the place of that in launch.runtime.gpus.
    """
    device = start_process_group(stall)
    world_size = dist.get_world_size()
    if recipe.engine == "single" and world_size > 1:
        raise UserError(
            f"engine: single trains in one process, not {world_size}; set engine=zero3 or start "
            "one rank"
        )
    if profile and recipe.eval.every is not None:
        raise UserError("--profile: records training steps alone; leave eval.every out")
    lock = FolderLock(folder)
    is_finished = run_on_rank0(lambda: open_run(folder, recipe, lock))
    if is_finished:
        print_rank0(f"{folder} holds this run, finished; see {folder / RESULTS}")
    else:
        # For a request to stop outside of training; `run_stages` handles one during it.
        watchdog.on_preempted(lambda: write_state(folder, "preempted"))
        watchdog.on_error(lambda line, code: write_state(folder, "error", line, code))
        try:
            run_stages(recipe, name, folder, device, profile, peak_tflops)
        except Exception as error:  # of every kind: state.json is to tell how the run ended
            line, code = describe_failure(error)
            if dist.get_rank() == 0:
                state = "diverged" if isinstance(error, DivergedError) else "error"
                with contextlib.suppress(OSError):  # of a full disk: the user is to see `error`
                    write_state(folder, state, line, code)
            raise
    stop_process_group()


def run_stages(
    recipe: Recipe,
    name: str,
    folder: Path,
    device: torch.device,
    profile: bool = False,
    peak_tflops: float | None = None,
) -> None:
    """Run the stages of a run in an opened run folder. Collective; see `fine_tune`."""
    run = prepare_run(recipe, name, folder, device)
    loaded = load_run_model(run, device)
    if run.saved is None:
        facts, earlier = initialise_run(run, loaded), []
    else:
        facts, earlier = restore_run(run, loaded), run.saved.history
    # A0 and B0 by module name, on rank 0; empty on the other ranks.
    initial = read_factors(loaded.lora_layers, loaded.engine)
    if run.saved is None:
        # A run that is killed before its first checkpoint need not calibrate or score again.
        save_checkpoint(run, loaded, None, initial, facts, earlier)
    peak_flops = find_peak_flops(device, run.inputs.dtype)
    if peak_tflops is not None:
        peak_flops = peak_tflops * 1e12
    history = train_model(run, loaded, initial, facts, earlier, profile, peak_flops)
    if len(history) < len(run.steps) and not has_stopped_early(run, history):
        run_on_rank0(lambda: write_state(folder, "preempted"))
        print_rank0(
            f"stopped after step {len(history)} of {len(run.steps)}, saved; the same command "
            "resumes from there"
        )
        return
    best_step = restore_best(run, loaded, history)
    exported = export_run(run, loaded, initial, history)
    watchdog.set_phase("scoring", timed=True)
    scored = f"after step {best_step or len(history)}"
    scores = score_run(run, loaded, run.problems, recipe.eval, scored, folder)
    after = measure_predictions(loaded.engine, loaded.model, run.measured)
    small = export_small(run, loaded, initial)
    results = make_results(run, loaded, facts, history, best_step, scores, after, small, peak_flops)
    run_on_rank0(lambda: write_run_results(run, results))
    print_rank0(run_on_rank0(lambda: render_runs([folder])))
    print_rank0(f"plots: {folder}/*.png  to load: {exported}")
    print_rank0(describe_next_steps(folder, run.recipe, results))
