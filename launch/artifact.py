"""A calibration on disk: one file of eigenvectors for each window, then spectrum.json, plots and, last, manifest.json.

Until it is finished the manifest is called unfinished.json; a start that finds it there goes on after the last window.
`window-<n>.safetensors` holds, for every module, fp64:

    <module>.vectors    (d_out, r)  the chosen eigenvectors, columns in ascending order of eigenvalue
    <module>.values     (r,)        their eigenvalues
    <module>.spectrum   (d_out,)    all eigenvalues
    <module>.checks     (3,)        how exact they are, in units of what is let pass (astra.eigen.Checks)
    <module>.angles     (r,) or (0,)  principal angles between the two halves' subspaces, with calibration.split_half
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from astra.calibrate import Found
from astra.eigen import Subspace
from launch.distributed import broadcast_tensor
from launch.errors import UserError
from launch.files import sync, sync_folder, write_json
from launch.recipe import Recipe

MANIFEST, UNFINISHED, SPECTRUM = "manifest.json", "unfinished.json", "spectrum.json"
FIELDS = ("vectors", "values", "spectrum", "checks", "angles")
CONTENT = {  # what decides the eigenvectors, and the recipe field that is to be looked at where it differs
    "base.weights_sha256": "model.name",
    "dtype": "model.dtype",
    "data.tokens_sha256": "data.path",
    "prompt": "data.path",
    "max_length": "data.max_length",
    "sample_ids": "calibration.samples",
    "seed": "calibration.seed",
    "eigen_select": "adapter.eigen_select",
    "targets": "adapter.targets",
}


def begin(folder: Path, manifest: dict) -> int:
    """How many windows `folder` already holds of the calibration that `manifest` describes; rank 0 calls it.

    Anything that is of another calibration is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / UNFINISHED
    described = json.loads(json.dumps({key: value for key, value in manifest.items() if key != "conditions"}))
    found = _read_json(path)
    if found is not None and {key: value for key, value in found.items() if key != "conditions"} == described:
        done = 0
        while _window(folder, done).is_file():
            done += 1
        return done
    for old in (path, *_windows(folder)):
        old.unlink(missing_ok=True)
    write_json(path, manifest)
    return 0


def save_window(folder: Path, number: int, found: Mapping[str, Found]) -> None:
    """Write one window's modules, aside and then renamed. Raises UserError if it cannot be written."""
    tensors = {}
    for name, one in found.items():
        of = one.subspace
        for field, value in zip(FIELDS, (of.vectors, of.values, of.spectrum, of.checks, one.angles), strict=True):
            tensors[f"{name}.{field}"] = value.cpu().contiguous()
    path = _window(folder, number)
    aside = path.with_suffix(".tmp")
    try:
        save_file(tensors, aside)
        sync(aside)
        aside.replace(path)
        sync_folder(folder)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"calibration: cannot write {path}: {error}; make room and start again") from None


def finish(folder: Path) -> None:
    """Mark the calibration in `folder` as whole."""
    (folder / UNFINISHED).replace(folder / MANIFEST)
    sync_folder(folder)


def modules(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every module's name and small tensors (all FIELDS but vectors), in the order they were found."""
    for path in _windows(folder):
        with safe_open(path, framework="pt") as file:
            for name in dict.fromkeys(key.rsplit(".", 1)[0] for key in file.keys()):  # noqa: SIM118 (not a dict)
                yield name, {field: file.get_tensor(f"{name}.{field}") for field in FIELDS[1:]}


def read(folder: Path, name: str, rank: int, select: str, device: torch.device) -> Subspace:
    """The `rank` eigenvectors of module `name` that `select` names: rank 0 reads, every rank gets them. Collective."""
    vectors = values = spectrum = checks = None

    def load() -> tuple[Tensor, ...]:
        for path in _windows(folder):
            with safe_open(path, framework="pt") as file:
                if f"{name}.vectors" in file.keys():  # noqa: SIM118 (not a dict)
                    return tuple(file.get_tensor(f"{name}.{field}") for field in FIELDS[:4])
        raise UserError(f"calibration.path: {folder} has no eigenvectors of {name}; calibrate again")

    if torch.distributed.get_rank() == 0:
        vectors, values, spectrum, checks = load()
        kept = vectors.shape[1]
        size = len(spectrum)
        start = {"smallest": 0, "largest": kept - rank, "random": 0, "middle": (size - rank) // 2 - (size - kept) // 2}
        columns = slice(start[select], start[select] + rank)
        vectors, values = vectors[:, columns].contiguous(), values[columns].contiguous()
    parts = [broadcast_tensor(tensor, device) for tensor in (vectors, values, spectrum, checks)]
    return Subspace(*parts)


def check(folder: Path, manifest: dict) -> None:
    """Raises UserError naming the first thing in which the calibration in `folder` is not that of `manifest`."""
    found = _read_json(folder / MANIFEST)
    if found is None:
        state = "is not finished; run launch/calibrate.py again" if (folder / UNFINISHED).is_file() else "has none"
        raise UserError(f"calibration.path: {folder} {state}")
    wanted = json.loads(json.dumps(manifest))
    for key, field in CONTENT.items():
        there, here = _get(found, key), _get(wanted, key)
        if there != here:
            raise UserError(
                f"{field}: the calibration in {folder} was made with another {key} ({_short(there)}, here "
                f"{_short(here)}); calibrate again, or set the recipe to it"
            )
    exact = wanted["eigen_select"] == "random"
    if found["rank"] < wanted["rank"] or (exact and found["rank"] != wanted["rank"]):
        raise UserError(
            f"adapter.rank: {wanted['rank']} eigenvectors are needed and the calibration in {folder} has "
            f"{found['rank']}; calibrate again with that rank"
        )


def copy_summary(source: Path, folder: Path) -> None:
    """What there is to look at of a calibration made elsewhere, into a run's own folder; its eigenvectors stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".png", ".md"):
            shutil.copy(path, folder / path.name)


def summary(folder: Path) -> dict:
    """spectrum.json of the calibration in `folder`. Rank 0 calls it."""
    return json.loads((folder / SPECTRUM).read_text(encoding="utf-8"))


def eigen_rank(recipe: Recipe) -> int:
    """Eigenvectors that a calibration keeps of each module, where it has as many."""
    wanted = recipe.adapter
    return max(2 * wanted.rank, 256) if wanted.rank_allocation == "effective_rank" else wanted.rank


def _window(folder: Path, number: int) -> Path:
    return folder / f"window-{number:04d}.safetensors"


def _windows(folder: Path) -> list[Path]:
    return sorted(folder.glob("window-[0-9][0-9][0-9][0-9].safetensors"))


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"calibration: cannot read {path}: {error}; remove it or choose another folder") from None


def _get(manifest: dict, key: str) -> object:
    value: object = manifest
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
