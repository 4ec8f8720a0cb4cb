"""A calibration on disk: one file for each window and, written last, manifest.json.

Until it is finished the manifest is called unfinished.json. A process that finds it there resumes
after the last window. Astra's also has spectrum.json, plots and a page (calibration/report.py).
`window-<n>.safetensors` holds what was solved of each module, fp64. For Astra:

    <module>.vectors    (d_out, k)     the chosen eigenvectors, in ascending order of eigenvalue
    <module>.values     (k,)           their eigenvalues
    <module>.spectrum   (d_out,)       all eigenvalues
    <module>.checks     (3,)           errors over their tolerances (astra.eigen.Checks)
    <module>.angles     (k,)           with calibration.split_half, the principal angles between the
                                       subspaces of the two halves, radians, ascending; else (0,)

For the other methods:

    <module>.a0         (k, d_in)      the initial factors; those that a smaller rank takes are first
    <module>.b0         (d_out, k)

k is the adapter's rank r, or more where ranks follow from the spectrum
(calibration.run.choose_kept_rank).
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from astra.calibrate import Solution
from launch.methods.registry import METHODS
from launch.models.identity import differs
from launch.runtime.distributed import broadcast_tensor, print_rank0
from launch.runtime.errors import UserError
from launch.runtime.files import sync_file, sync_folder, write_json

MANIFEST, UNFINISHED, SPECTRUM = "manifest.json", "unfinished.json", "spectrum.json"
# Keys of the manifest in which a run and the calibration that it reuses must agree -> the recipe
# field to look at where they differ.
COMPARED_FIELDS = {
    "method": "adapter.method",
    "statistics": "calibration.statistics",
    "base.weights_sha256": "model.name",
    "base.config_sha256": "model.name",  # not in earlier calibrations
    "dtype": "model.dtype",
    "data.tokens_sha256": "data.path",
    "prompt": "data.path",
    "max_length": "data.max_length",
    "sample_ids": "calibration.samples",
    "seed": "calibration.seed",
    "eigen_select": "adapter.eigen_select",
    "corda_mode": "adapter.corda_mode",
    "scaling": "adapter.alpha",
    "targets": "adapter.targets",
    "exclude": "adapter.exclude",
    "task": "task.kind",
    "head_seed": "train.seed",
    "labels": "task.labels",
}


# Further keys in which a calibration that is resumed must agree.
RESUMED_KEYS = ("rank", "batch_size", "split_half", "tie_break", "windows")

OTHER_DATA = "calibration_data"  # key of the recipe's calibration.data; absent for training rows


class Begun(NamedTuple):
    """What earlier starts made of a calibration."""

    num_windows: int
    seconds: float


def begin_calibration(folder: Path, manifest: dict) -> Begun:
    """Note that the calibration which `manifest` describes is made in `folder`. Rank 0 calls it.

    Files of another calibration are removed, and a line says so if there are windows among them.

    Returns:
        What there is of this calibration already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / UNFINISHED
    found, num_windows = _read_json(path), _count_windows(folder)
    if found is not None:
        others = _list_differences(found, manifest, (*COMPARED_FIELDS, *RESUMED_KEYS))
        if not others:
            return Begun(num_windows, found.get("seconds", 0.0))
        if num_windows:
            print_rank0(
                f"calibration: {num_windows} finished window{'s' if num_windows > 1 else ''} in "
                f"{folder} made again: another {', '.join(others)}"
            )
    for old in (path, *_list_windows(folder)):
        old.unlink(missing_ok=True)
    write_json(path, manifest)
    return Begun(0, 0.0)


def _list_differences(found: dict, wanted: dict, keys: Iterable[str]) -> list[str]:
    """List those of `keys` in which two manifests differ."""
    wanted = json.loads(json.dumps(wanted))  # as `found` has been read
    different = []
    for key in keys:
        there, here = get_value(found, key), get_value(wanted, key)
        # Earlier calibrations have no such hash.
        if differs(there, here) if key == "base.config_sha256" else there != here:
            different.append(key)
    return different


def _count_windows(folder: Path) -> int:
    """Count the windows from the first one on, without gaps."""
    count = 0
    while _name_window(folder, count).is_file():
        count += 1
    return count


def save_window(
    folder: Path, number: int, solutions: Mapping[str, Solution], seconds: float
) -> None:
    """Write the solutions of one window's modules, whole or not at all.

    Args:
        seconds: that the calibration has taken so far, in all its starts.

    Raises:
        UserError: they cannot be written.
    """
    tensors = {}
    for name, solution in solutions.items():
        for field, value in solution.items():
            tensors[f"{name}.{field}"] = value.contiguous()
    path = _name_window(folder, number)
    aside = path.with_suffix(".tmp")
    try:
        save_file(tensors, aside)
        sync_file(aside)
        aside.replace(path)
        sync_folder(folder)
        _note_facts(folder, {"seconds": seconds})
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise UserError(
            f"calibration: cannot write {path}: {error}; make room and start again"
        ) from None


def finish_calibration(folder: Path, facts: dict) -> None:
    """Mark the calibration in `folder` as whole, and note `facts` in its manifest."""
    _note_facts(folder, facts)
    (folder / UNFINISHED).replace(folder / MANIFEST)
    sync_folder(folder)


def _note_facts(folder: Path, facts: dict) -> None:
    """Add `facts` to the manifest of an unfinished calibration."""
    write_json(folder / UNFINISHED, _read_json(folder / UNFINISHED) | facts)


def is_finished(folder: Path) -> bool:
    """Return whether `folder` holds a whole calibration."""
    return (folder / MANIFEST).is_file()


def read_memory_record(folder: Path) -> list[float | None]:
    """Read the limit, in GiB, that the calibration in `folder` was begun with. Rank 0 calls it.

    Returns:
        The limit, where None stands for no limit; an empty list if there is no calibration, or one
        of a version that did not record it.
    """
    manifest = _read_json(folder / MANIFEST) or _read_json(folder / UNFINISHED) or {}
    conditions = manifest.get("conditions", {})
    return [conditions["memory_gib"]] if "memory_gib" in conditions else []


def read_seconds(folder: Path) -> float:
    """Read how long the finished calibration in `folder` took."""
    return _read_json(folder / MANIFEST)["seconds"]


def read_solutions(folder: Path) -> Iterator[tuple[str, Solution]]:
    """Yield every module's name, and its solution without the eigenvectors.

    Window by window, and by name within one.
    """
    for path in _list_windows(folder):
        with safe_open(path, framework="pt") as file:
            fields: dict[str, list[str]] = {}
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name, field = key.rsplit(".", 1)
                if field != "vectors":
                    fields.setdefault(name, []).append(field)
            for name, names in fields.items():
                yield name, {field: file.get_tensor(f"{name}.{field}") for field in names}


def read_solution(
    folder: Path, name: str, device: torch.device, crop: Callable[[Solution], Solution]
) -> Solution:
    """Read one module's solution on rank 0, and hand it to every rank. Collective.

    Args:
        crop: rank 0 applies it before the result is sent.

    Raises:
        UserError: the calibration has no such module.
    """
    tensors: Solution = {}
    if dist.get_rank() == 0:
        tensors = crop(load_solution(folder, name))
    fields = [list(tensors)]
    dist.broadcast_object_list(fields)
    solution = {}
    for field in fields[0]:
        value = tensors.get(field)
        solution[field] = broadcast_tensor(None if value is None else value.contiguous(), device)
    return solution


def list_modules(folder: Path) -> list[str]:
    """Return the names of the modules that the calibration in `folder` has solved."""
    return [name for name, _ in read_solutions(folder)]


def read_manifest(folder: Path, option: str) -> dict:
    """Read the manifest of a finished calibration. Raises UserError naming `option`."""
    found = _read_json(folder / MANIFEST)
    if found is None:
        unfinished = (folder / UNFINISHED).is_file()
        state = "is not finished; run launch/calibrate.py again" if unfinished else "has none"
        raise UserError(f"{option}: {folder} {state}")
    return found


def load_solution(folder: Path, name: str) -> Solution:
    """Load one module's whole solution. Raises UserError if the calibration has no such module."""
    prefix = f"{name}."
    for path in _list_windows(folder):
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key.rpartition(".")[0] == name]  # noqa: SIM118
            if keys:
                return {key.removeprefix(prefix): file.get_tensor(key) for key in keys}
    raise UserError(f"calibration.path: {folder} has no solution of {name}; calibrate again")


def check_calibration(folder: Path, manifest: dict) -> None:
    """Raise UserError if a run that `manifest` describes cannot reuse the calibration in `folder`.

    The error names the first of COMPARED_FIELDS that differs, or a rank that does not fit.
    """
    found = read_manifest(folder, "calibration.path")
    wanted = json.loads(json.dumps(manifest))
    for key in _list_differences(found, wanted, COMPARED_FIELDS):
        _refuse_difference(folder, found, wanted, key)
    is_random = wanted["eigen_select"] == "random"
    needs_exact_rank = is_random or METHODS[wanted["method"]].needs_exact_rank
    if found["rank"] < wanted["rank"] or (needs_exact_rank and found["rank"] != wanted["rank"]):
        raise UserError(
            f"adapter.rank: {wanted['rank']} vectors are needed and the calibration in {folder} "
            f"has {found['rank']}; calibrate again with that rank"
        )


def _refuse_difference(folder: Path, found: dict, wanted: dict, key: str) -> None:
    """Raise UserError for the key of COMPARED_FIELDS in which `found`, in `folder`, differs."""
    field = COMPARED_FIELDS[key]
    there, here = _shorten(get_value(found, key)), _shorten(get_value(wanted, key))
    what = f"another {key}"
    if field == "data.path" and get_value(wanted, "data.sources"):
        field = "data.sources"  # a mix
    if key == "data.tokens_sha256" and (found.get(OTHER_DATA) or wanted.get(OTHER_DATA)):
        field, what = "calibration.data", "other data"
        there, here = describe_data(found), describe_data(wanted)
    raise UserError(
        f"{field}: the calibration in {folder} was made with {what} ({there}, here {here}); "
        "calibrate again, or set the recipe to it"
    )


def describe_data(manifest: dict) -> str:
    """Name the examples that a manifest is of, and a part of their hash."""
    data = manifest["data"] or {"path": "none", "tokens_sha256": ""}
    what = "" if manifest.get(OTHER_DATA) else "the training rows "
    return f"{what}{data['path']} {data['tokens_sha256'][:8]}"


def copy_summary(source: Path, folder: Path) -> None:
    """Copy what there is to look at of a calibration into a run's own folder, not its solutions."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".png", ".md"):
            shutil.copy(path, folder / path.name)


def read_summary(folder: Path) -> dict:
    """Read spectrum.json of the calibration in `folder`."""
    return json.loads((folder / SPECTRUM).read_text(encoding="utf-8"))


def _name_window(folder: Path, number: int) -> Path:
    return folder / f"window-{number:04d}.safetensors"


def _list_windows(folder: Path) -> list[Path]:
    return sorted(folder.glob("window-[0-9][0-9][0-9][0-9].safetensors"))


def _read_json(path: Path) -> dict | None:
    """Read a JSON file; None if it is not there. Raises UserError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"calibration: cannot read {path}: {error}; remove it or choose another folder"
        ) from None


def get_value(manifest: dict, key: str) -> object:
    """Return the value at a key such as `base.weights_sha256`; None if there is none."""
    value: object = manifest
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
