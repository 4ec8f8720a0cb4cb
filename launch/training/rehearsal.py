"""Refuse a run in its first minute if what it trains could not be saved or exported at its end."""

import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from launch.runtime import watchdog
from launch.runtime.errors import USER_ERRORS, RankZeroError, UserError, is_rank0_error
from launch.runtime.shortages import describe_shortage
from launch.runtime.units import GIB
from launch.training.checkpoint import REHEARSAL, CheckpointStore

NAMED_PATTERNS = 3  # at most so many patterns of names are in a line


@contextmanager
def refuse_unsaveable(checkpoints: CheckpointStore) -> Iterator[None]:
    """Turn any error of the saves inside into a UserError, and remove what they wrote."""
    try:
        with watchdog.without_stall_limit():
            yield
    except USER_ERRORS:
        raise
    except Exception as error:
        if describe_shortage(error, watchdog.current_phase()) is not None:
            raise
        if isinstance(error, RuntimeError) and not is_rank0_error(error):
            watchdog.report_lost_peer()
        text = (
            str(error) if isinstance(error, RankZeroError) else f"{type(error).__name__}: {error}"
        )
        raise UserError(
            "what this run trains could not be saved at its end, so it stops after its first step: "
            f"{' '.join(text.split())[:500]}; choose another adapter.method or engine, and please "
            "report it with the base's name"
        ) from error
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(checkpoints.folder / REHEARSAL, ignore_errors=True)


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise UserError if the run's next checkpoint and its export do not fit on the disk.

    Args:
        folder: of the run.
        num_bytes: that they take at least.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"--output: No space left on device: a checkpoint and the export take at least "
            f"{num_bytes / GIB:.2f} GiB, and {free / GIB:.2f} GiB are free in {folder}; make room, "
            "or choose a folder on another disk"
        )


def find_unreached_adapters(unreached: Collection[str], trained: Collection[str]) -> list[str]:
    """Return the parameters of adapters that no gradient has reached at all.

    A has a gradient of exactly 0 as long as B is 0.
    """
    reached = {name.rpartition(".")[0] for name in trained if name not in set(unreached)}
    return [name for name in unreached if name.rpartition(".")[0] not in reached]


def describe_unreached(unreached: Collection[str], trained: Collection[str], decays: bool) -> str:
    """Say which trained parameters had no gradient in the first step.

    Args:
        unreached: their names.
        trained: the names of all trained parameters.
        decays: whether weight decay changes them all the same.
    """
    patterns = _find_patterns(set(unreached), trained)
    named = ", ".join(patterns[:NAMED_PATTERNS])
    if len(patterns) > NAMED_PATTERNS:
        named += f" and {len(patterns) - NAMED_PATTERNS} more"
    kept = "only weight decay changes them" if decays else "they stay as they are"
    return (
        f"{len(unreached)} of {len(trained)} trained parameters had no gradient so far: {named}; "
        f"unless later rows reach them, {kept}"
    )


def _find_patterns(unreached: set[str], trained: Collection[str]) -> list[str]:
    """Name the largest modules that hold only `unreached` parameters, numbers replaced by *."""
    reached_modules = set()
    for name in trained:
        if name not in unreached:
            parts = name.split(".")
            reached_modules.update(".".join(parts[:i]) for i in range(len(parts)))
    patterns: dict[str, None] = {}
    for name in trained:
        if name not in unreached:
            continue
        parts = name.split(".")
        length = next(
            i for i in range(1, len(parts) + 1) if ".".join(parts[:i]) not in reached_modules
        )
        pattern = ".".join(parts[:length]) + (".*" if length < len(parts) else "")
        patterns[re.sub(r"\.\d+(?=\.|$)", ".*", pattern)] = None
    return list(patterns)
