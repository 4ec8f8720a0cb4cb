"""Checkpoints of a run: all that training goes on from, alike for every engine and world size.

A checkpoint is a folder `checkpoints/step-<n>` with `tensors.safetensors`, `metrics.jsonl` and, written last,
`manifest.json` with the SHA-256 of the other two and its own. It is made beside and renamed, so it is whole or absent;
what the disk does to it later is found by the checksums. The tensors are called by a trained parameter's name
(launch.methods.trainable) and kind:

    initial               an adapter's factors A and B at step 0, from which W_res is rebuilt; nothing else is at step 0
    trained               the parameter now, fp32: the optimiser's own copy where the model holds a rounded one
    exp_avg, exp_avg_sq   AdamW's moments

The rows of every step follow from (recipe, step), and dropout's seed from (recipe, step, rank), so a step is all there
is to know of the data position and of the random numbers.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from astra.adapter import Factors
from launch.engines.base import KINDS, Stepper
from launch.runtime import watchdog as watch
from launch.runtime.distributed import broadcast_tensor, on_rank0
from launch.runtime.errors import UserError
from launch.runtime.files import sync, sync_folder, write_json
from launch.training.loop import Metrics

FOLDER = "checkpoints"  # in the run folder
STEPS = f"step-{'[0-9]' * 7}"
TENSORS, METRICS, MANIFEST = "tensors.safetensors", "metrics.jsonl", "manifest.json"

_damaged: set[Path] = set()  # that this process has passed over


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, as every rank sees it; only rank 0 need see its files."""

    folder: Path
    step: int
    facts: dict  # what `save` was given
    history: list[Metrics]  # of the steps done


def save(
    run: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    initial: Mapping[str, Factors],
    stepper: Stepper | None,
    facts: dict,
    history: list[Metrics],
    keep: int,
) -> None:
    """Write the checkpoint of `step` into the run folder `run`, then remove all but the `keep` newest. Collective.

    The tensors are gathered one after the other; only rank 0 keeps them, in the CPU's memory, until they are written.

    Args:
        parameters: name -> trained parameter. initial: module name -> A0, B0 of adapters.
        stepper: None at step 0, when what is trained follows from `initial` and the base.
        facts: JSON that `newest` gives back.

    Raises:
        UserError: on every rank, if it cannot be written; the older ones are as they were.
    """
    tensors = {}
    for name, parameter in parameters.items() if stepper is not None else ():
        watch.mark()
        for kind, value in zip(KINDS, stepper.state(parameter), strict=True):
            if dist.get_rank() == 0:
                tensors[f"{name}.{kind}"] = value.cpu().contiguous()
    for name, factors in initial.items():
        for side, value in zip("AB", factors, strict=True):
            tensors[f"{name}.{side}.initial"] = value.contiguous()

    def write() -> None:
        _write(run / FOLDER, step, tensors, facts, history)
        _prune(run / FOLDER, step, keep)

    with watch.untimed():
        on_rank0(write)


def newest(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint in the run folder `run`, or None; says which ones are damaged. Rank 0 calls it."""
    for path in sorted((run / FOLDER).glob(STEPS), reverse=True):
        try:
            manifest = _verify(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"checkpoint {path} is damaged and passed over: {error}", flush=True)
            _damaged.add(path)
            continue
        lines = (path / METRICS).read_text(encoding="utf-8").splitlines()
        return Checkpoint(
            path, manifest["step"], manifest["facts"], [json.loads(line) for line in lines]
        )
    return None


def initial(
    checkpoint: Checkpoint, device: torch.device
) -> Callable[[str, Tensor], tuple[Tensor, Tensor]]:
    """(module name, W) -> (A0, B0): rank 0 reads them, every rank gets them. Collective, in order of calls."""
    return lambda name, _: tuple(
        _read(checkpoint, f"{name}.{side}.initial", device) for side in "AB"
    )


def restore(
    checkpoint: Checkpoint,
    parameters: Mapping[str, nn.Parameter],
    stepper: Stepper,
    device: torch.device,
) -> None:
    """The trained parameters, and AdamW's moments of them, as they were after the checkpoint's step. Collective."""
    if checkpoint.step == 0:
        return
    stepper.restore(
        checkpoint.step,
        (
            (parameter, *(_read(checkpoint, f"{name}.{kind}", device) for kind in KINDS))
            for name, parameter in parameters.items()
        ),
    )


def _read(checkpoint: Checkpoint, name: str, device: torch.device) -> Tensor:
    value = None
    if dist.get_rank() == 0:
        with safe_open(checkpoint.folder / TENSORS, framework="pt") as file:
            value = file.get_tensor(name)
    return broadcast_tensor(value, device)


def _write(
    folder: Path, step: int, tensors: dict[str, Tensor], facts: dict, history: list[Metrics]
) -> None:
    path = folder / f"step-{step:07d}"
    aside = folder / f"tmp-{path.name}"
    try:
        for left in folder.glob("tmp-*"):  # of a start that was killed
            shutil.rmtree(left)
        aside.mkdir(parents=True)
        save_file(tensors, aside / TENSORS)
        (aside / METRICS).write_text(
            "".join(json.dumps(metrics) + "\n" for metrics in history), encoding="utf-8"
        )
        for name in (TENSORS, METRICS):
            sync(aside / name)
        sums = {name: _sha256(aside / name) for name in (TENSORS, METRICS)}
        manifest = {"step": step, "sha256": sums, "facts": facts}
        write_json(aside / MANIFEST, manifest | {"manifest_sha256": _manifest_sum(manifest)})
        if path.exists():  # damaged: a whole one would have been resumed from
            shutil.rmtree(path)
        aside.rename(path)
        _damaged.discard(path)
        sync_folder(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"checkpoint of step {step}: cannot write {path}: {error}; make room and start the same command again, "
            "which goes on from the one before"
        ) from None


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove all but the `keep` newest whole ones up to `step`, which is one."""
    older = sorted(
        path for path in folder.glob(STEPS) if int(path.name.removeprefix("step-")) <= step
    )
    kept = [path for path in older if path not in _damaged][-keep:]
    for path in older:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _verify(path: Path) -> dict:
    """The manifest of a whole checkpoint. Raises what reading and checking raise for a damaged one."""
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if manifest.pop("manifest_sha256") != _manifest_sum(manifest):
        raise ValueError(f"{MANIFEST} does not have its checksum")
    for name in (TENSORS, METRICS):
        if _sha256(path / name) != manifest["sha256"][name]:
            raise ValueError(f"{name} does not have its checksum")
    if path.name != f"step-{manifest['step']:07d}":
        raise ValueError(f"{MANIFEST} is of step {manifest['step']}")
    return manifest


def _manifest_sum(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
