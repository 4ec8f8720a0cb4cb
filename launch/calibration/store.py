"""A calibration on disk: one file for each window and, last, manifest.json; for Astra, spectrum.json and plots too.

Until it is finished the manifest is called unfinished.json; a start that finds it there goes on after the last window.
`window-<n>.safetensors` holds, for every module, fp64, what its method finds. For Astra:

    <module>.vectors    (d_out, r)  the chosen eigenvectors, columns in ascending order of eigenvalue
    <module>.values     (r,)        their eigenvalues
    <module>.spectrum   (d_out,)    all eigenvalues
    <module>.checks     (3,)        how exact they are, in units of what is let pass (astra.eigen.Checks)
    <module>.angles     (r,) or (0,)  principal angles between the two halves' subspaces, with calibration.split_half

For the other methods:

    <module>.a0         (r, d_in)   the initial factors, those that a smaller rank would take first
    <module>.b0         (d_out, r)
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from astra.calibrate import Found
from astra.eigen import Subspace
from launch.config.schema import Recipe
from launch.runtime.distributed import broadcast_tensor
from launch.runtime.errors import UserError
from launch.runtime.files import sync, sync_folder, write_json

MANIFEST, UNFINISHED, SPECTRUM = "manifest.json", "unfinished.json", "spectrum.json"
CONTENT = {  # what decides what is found, and the recipe field that is to be looked at where it differs
    "method": "adapter.method",
    "statistics": "calibration.statistics",
    "base.weights_sha256": "model.name",
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
}


def begin(folder: Path, manifest: dict) -> int:
    """How many windows `folder` already holds of the calibration that `manifest` describes; rank 0 calls it.

    Anything that is of another calibration is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / UNFINISHED
    described = json.loads(
        json.dumps({key: value for key, value in manifest.items() if key != "conditions"})
    )
    found = _read_json(path)
    if (
        found is not None
        and {key: value for key, value in found.items() if key != "conditions"} == described
    ):
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
    tensors = {
        f"{name}.{key}": value.cpu().contiguous()
        for name, one in found.items()
        for key, value in one.items()
    }
    path = _window(folder, number)
    aside = path.with_suffix(".tmp")
    try:
        save_file(tensors, aside)
        sync(aside)
        aside.replace(path)
        sync_folder(folder)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise UserError(
            f"calibration: cannot write {path}: {error}; make room and start again"
        ) from None


def finish(folder: Path, facts: dict) -> None:
    """Mark the calibration in `folder` as whole, and note `facts` in its manifest."""
    write_json(folder / UNFINISHED, _read_json(folder / UNFINISHED) | facts)
    (folder / UNFINISHED).replace(folder / MANIFEST)
    sync_folder(folder)


def seconds(folder: Path) -> float:
    """What the finished calibration in `folder` took. Rank 0 calls it."""
    return _read_json(folder / MANIFEST)["seconds"]


def modules(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every module's name and what was found of it but its vectors, in the order they were found."""
    for path in _windows(folder):
        with safe_open(path, framework="pt") as file:
            fields: dict[str, list[str]] = {}
            for name, field in (key.rsplit(".", 1) for key in file.keys()):  # noqa: SIM118 (not a dict)
                fields.setdefault(name, []).append(field)
            for name, of in fields.items():
                yield (
                    name,
                    {
                        field: file.get_tensor(f"{name}.{field}")
                        for field in of
                        if field != "vectors"
                    },
                )


def read_subspace(
    folder: Path, name: str, rank: int, select: str, device: torch.device
) -> Subspace:
    """The `rank` eigenvectors of module `name` that `select` names: rank 0 reads, every rank gets them. Collective."""

    def crop(
        vectors: Tensor, values: Tensor, spectrum: Tensor, checks: Tensor
    ) -> tuple[Tensor, ...]:
        kept, size = vectors.shape[1], len(spectrum)
        start = {
            "smallest": 0,
            "largest": kept - rank,
            "random": 0,
            "middle": (size - rank) // 2 - (size - kept) // 2,
        }
        columns = slice(start[select], start[select] + rank)
        return vectors[:, columns], values[columns], spectrum, checks

    return Subspace(*_read(folder, name, ("vectors", "values", "spectrum", "checks"), crop, device))


def read_factors(folder: Path, name: str, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first `rank` of the initial factors (A0, B0) of module `name`, likewise. Collective."""
    return _read(folder, name, ("a0", "b0"), lambda a0, b0: (a0[:rank], b0[:, :rank]), device)


def _read(
    folder: Path,
    name: str,
    fields: tuple[str, ...],
    crop: Callable[..., tuple[Tensor, ...]],
    device: torch.device,
) -> tuple[Tensor, ...]:
    def load() -> tuple[Tensor, ...]:
        for path in _windows(folder):
            with safe_open(path, framework="pt") as file:
                if f"{name}.{fields[0]}" in file.keys():  # noqa: SIM118 (not a dict)
                    return crop(*(file.get_tensor(f"{name}.{field}") for field in fields))
        raise UserError(f"calibration.path: {folder} has no {fields[0]} of {name}; calibrate again")

    tensors = [None] * len(fields)
    if torch.distributed.get_rank() == 0:
        tensors = [tensor.contiguous() for tensor in load()]
    return tuple(broadcast_tensor(tensor, device) for tensor in tensors)


def check(folder: Path, manifest: dict) -> None:
    """Raises UserError naming the first thing in which the calibration in `folder` is not that of `manifest`."""
    found = _read_json(folder / MANIFEST)
    if found is None:
        state = (
            "is not finished; run launch/calibrate.py again"
            if (folder / UNFINISHED).is_file()
            else "has none"
        )
        raise UserError(f"calibration.path: {folder} {state}")
    wanted = json.loads(json.dumps(manifest))
    for key, field in CONTENT.items():
        there, here = _get(found, key), _get(wanted, key)
        if there != here:
            raise UserError(
                f"{field}: the calibration in {folder} was made with another {key} ({_short(there)}, here "
                f"{_short(here)}); calibrate again, or set the recipe to it"
            )
    exact = wanted["eigen_select"] == "random" or wanted["method"] == "lora_ga"
    if found["rank"] < wanted["rank"] or (exact and found["rank"] != wanted["rank"]):
        raise UserError(
            f"adapter.rank: {wanted['rank']} vectors are needed and the calibration in {folder} has "
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


def kept_rank(recipe: Recipe) -> int:
    """Vectors that a calibration keeps of each module, where it has as many."""
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
        raise UserError(
            f"calibration: cannot read {path}: {error}; remove it or choose another folder"
        ) from None


def _get(manifest: dict, key: str) -> object:
    value: object = manifest
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
