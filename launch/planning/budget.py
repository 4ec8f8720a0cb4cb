"""Decide `calibration.memory_gib: auto` before the model is loaded, once for a calibration."""

from pathlib import Path

import torch
import torch.distributed as dist

from launch.calibration.batches import count_tokens, draw_samples
from launch.calibration.store import is_finished, read_memory_record
from launch.config.schema import Recipe
from launch.data.inputs import Inputs
from launch.engines.nodes import count_node_ranks
from launch.models.check import read_config
from launch.planning.estimate import CalibrationNeeds, estimate_calibration_needs
from launch.planning.machine import RESERVE
from launch.planning.model import try_estimate
from launch.runtime.distributed import all_reduce_max, print_rank0, run_on_rank0
from launch.runtime.memory import measure_free_memory
from launch.runtime.units import GIB

FIELD = "calibration.memory_gib"


def decide_memory(
    recipe: Recipe, inputs: Inputs, device: torch.device, folder: Path
) -> tuple[Recipe, dict[str, float | None]]:
    """Give calibration.memory_gib a value where it is `auto`, before the model is loaded.

    Collective. The value is the free memory of the rank with the least, minus a tenth, minus the
    model and a forward pass. A calibration that was begun in `folder` keeps the value that it
    was begun with, and so its windows, unless they no longer fit. A value that the recipe has is
    checked.

    Args:
        folder: of the calibration.

    Returns:
        The recipe with the value, and by the field's name the value to be recorded. The recipe as
        it is, and nothing, where there is nothing to be decided.

    Raises:
        AstraError: the recipe sets a limit that needs windows, which the model cannot run in.
    """
    settings = recipe.calibration
    is_made = recipe.adapter.method_record.is_calibrated and settings.path is None
    if settings.memory_gib is None or not is_made:
        return recipe, {}
    if settings.memory_gib != "auto":
        run_on_rank0(lambda: _check_limit(recipe, inputs, folder))
        return recipe, {}
    record = run_on_rank0(lambda: read_memory_record(folder))
    if run_on_rank0(lambda: is_finished(folder)):
        return recipe, {FIELD: record[0]} if record else {}
    memory_gib, line = _choose_memory(recipe, inputs, device, record)
    print_rank0(line)
    calibration = settings.model_copy(update={"memory_gib": memory_gib})
    return recipe.model_copy(update={"calibration": calibration}), {FIELD: memory_gib}


def _choose_memory(
    recipe: Recipe, inputs: Inputs, device: torch.device, record: list[float | None]
) -> tuple[float | None, str]:
    """Return the limit in GiB, None for none, and the line that says it. Collective.

    Args:
        record: the limit that the calibration was begun with; empty if it was not begun.
    """
    # The least of all ranks: all have the same windows.
    free = -all_reduce_max(-float(measure_free_memory(device)), device)
    node_size = count_node_ranks() if recipe.shard_within == "node" else None
    taken, problem = run_on_rank0(lambda: _estimate_taken(recipe, inputs, device, node_size))
    if problem is not None:
        return None, f"{FIELD}: auto is no limit, as {problem}"
    # What was decided once fits while the reserve is not used up.
    if record and (record[0] is None or record[0] * GIB <= free - taken):
        return record[0], f"{FIELD}: auto stays {_format_limit(record[0])}, as it was begun with"
    memory_gib = max(0.0, (1 - RESERVE) * free - taken) / GIB
    change = f", as {_format_limit(record[0])} no longer fits" if record else ""
    return memory_gib, (
        f"{FIELD}: auto is {_format_limit(memory_gib)} on each rank{change}: {free / GIB:.3g} GiB "
        f"free, less {RESERVE:.0%}, less {taken / GIB:.3g} GiB for the model and a forward pass"
    )


def _estimate_taken(
    recipe: Recipe, inputs: Inputs, device: torch.device, node_size: int | None
) -> tuple[int, str | None]:
    """Estimate the bytes that the model and a forward pass take on each rank. Rank 0 calls it.

    Args:
        node_size: see launch.planning.memory.count_held_bytes.

    Returns:
        The bytes, and None; or 0, and why there can be no limit.
    """
    needs, problem = _estimate_needs(recipe, inputs, node_size)
    if needs is None:
        return 0, f"there is no estimate: {problem}"
    if not needs.batch.can_split:
        return 0, "this model cannot run in windows"
    taken = needs.taken_bytes
    if device.type == "cpu":
        taken += needs.batch.hidden_states  # on GPUs they are in other memory than the sums
    return taken, None


def _check_limit(recipe: Recipe, inputs: Inputs, folder: Path) -> None:
    """Check the limit that the recipe sets for a calibration still to be made. Rank 0 calls it.

    As the calibration, it counts the tokens of the longest sample. A model of which there is no
    estimate is not checked.

    Raises:
        AstraError: the limit needs windows, which the model cannot run in.
    """
    if is_finished(folder):
        return
    lengths = count_tokens(recipe, inputs, draw_samples(recipe, inputs))
    if len(lengths):
        data = recipe.data.model_copy(update={"max_length": int(lengths.max())})
        recipe = recipe.model_copy(update={"data": data})
    needs, _ = _estimate_needs(recipe, inputs, None)
    if needs is not None and not needs.batch.can_split:
        needs.batch.plan_windows(recipe.calibration.memory_gib)


def _estimate_needs(
    recipe: Recipe, inputs: Inputs, node_size: int | None
) -> tuple[CalibrationNeeds, None] | tuple[None, str]:
    """Return what the calibration needs, and None; or None, and why there is no estimate."""
    config = read_config(inputs.model_path, head=inputs.head)
    return try_estimate(
        lambda: estimate_calibration_needs(
            config,
            recipe,
            inputs.dtype,
            dist.get_world_size(),
            node_size,
            inputs.model.head_parameters,
        )
    )


def _format_limit(memory_gib: float | None) -> str:
    return "no limit" if memory_gib is None else f"{memory_gib:.3g} GiB"
