"""Compare two calibrations without training: principal angles between what they found.

Of each module the subspaces are the columns of B0, a part of the outputs' space, and the rows of
A0, a part of the inputs'. Astra's A0 follows from B0 and the weight and is left out, as is a B0 of
zeros.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from astra.calibrate import Solution, compute_principal_angles
from launch.calibration.report import (
    format_range,
    group_by_kind,
    list_layers,
    place_module,
    plot_by_layer,
)
from launch.calibration.store import (
    describe_data,
    get_value,
    list_modules,
    load_solution,
    read_manifest,
)
from launch.run.folder import make_folder
from launch.runtime.errors import UserError
from launch.runtime.files import write_json, write_text

ANGLES, PAGE = "angles.json", "README.md"
# Keys of the manifests that must agree, and the recipe field that is named where they do not.
SAME = {
    "base.weights_sha256": "model.name",
    "dtype": "model.dtype",
    "method": "adapter.method",
    "eigen_select": "adapter.eigen_select",
    "corda_mode": "adapter.corda_mode",
    "rank": "adapter.rank",
    "targets": "adapter.targets",
    "exclude": "adapter.exclude",
    "statistics": "calibration.statistics",
    "scaling": "adapter.alpha",
    "task": "task.kind",
    "max_length": "data.max_length",
}
# What a key stands for where a manifest has none: it is of an earlier version, of a causal task, or of
# a method that does not depend on it.
ABSENT = {"statistics": "exact", "task": "causal"}
SIDES = {"B0": "the outputs' space", "A0": "the inputs' space"}
NOTE = """Angles in degrees, least to greatest over the layers. Overlap: mean squared cosine of the angles, 1 for
the same subspace; two random subspaces would have r / d. Where a subspace lies in what the weight
cannot reach, no data decides it, and equal seeds give equal subspaces."""


class Comparison(NamedTuple):
    """How far apart two calibrations' subspaces of one module are, on one side."""

    size: int  # d, of the space
    rank: int  # r
    median_angle: float  # degrees
    largest_angle: float  # degrees
    overlap: float  # mean squared cosine


def compare_calibrations(first: Path, second: Path, output: Path) -> str:
    """Write angles.json, a figure for each side and README.md to `output`; return that page.

    Args:
        first, second: folders of finished calibrations that agree in SAME.
        output: made if it is not there.

    Raises:
        UserError: a calibration is not finished, the two differ in more than data, or `output`
            cannot be written.
    """
    manifests = [read_manifest(folder, "--compare") for folder in (first, second)]
    _require_comparable(first, second, manifests)
    make_folder(output)
    sides: dict[str, dict[str, Comparison]] = {}
    targets = manifests[0]["targets"]
    for name in sorted(list_modules(first), key=lambda name: place_module(name, targets)):
        spans = [_find_spans(load_solution(folder, name)) for folder in (first, second)]
        for side in sorted(spans[0].keys() & spans[1].keys()):
            sides.setdefault(side, {})[name] = compare_spans(spans[0][side], spans[1][side])
    figures = []
    for side, modules in sides.items():
        overlaps = {name: module.overlap for name, module in modules.items()}
        path = output / f"overlap_{side}.png"
        figures.append(plot_by_layer(overlaps, f"overlap of {side}'s subspaces", path))
    values = {}
    for side, modules in sides.items():
        values[side] = {name: module._asdict() for name, module in modules.items()}
    write_json(output / ANGLES, values)
    page = _render_page(first, second, manifests, sides)
    pictures = "\n".join(f"![{figure.stem}]({figure.name})" for figure in figures)
    write_text(output / PAGE, f"{page}\n{pictures}\n\n`{ANGLES}` has every module.\n")
    return page


def compare_spans(a: Tensor, b: Tensor) -> Comparison:
    """Compare the spans of two matrices with orthonormal columns, (d, r), fp64."""
    angles = compute_principal_angles(a, b)
    return Comparison(
        size=len(a),
        rank=len(angles),
        median_angle=math.degrees(angles.median().item()),
        largest_angle=math.degrees(angles.max().item()),
        overlap=angles.cos().square().mean().item(),
    )


def _find_spans(solution: Solution) -> dict[str, Tensor]:
    """Return orthonormal bases of what a calibration found of a module, by side of the adapter."""
    if "vectors" in solution:
        return {"B0": solution["vectors"]}
    spans = {"A0": torch.linalg.qr(solution["a0"].T).Q}
    if solution["b0"].any():
        spans["B0"] = torch.linalg.qr(solution["b0"]).Q
    return spans


def _require_comparable(first: Path, second: Path, manifests: list[dict]) -> None:
    """Raise UserError if the calibrations differ in what would decide the angles beside the data."""
    for key, field in SAME.items():
        one, other = (_get_value(manifest, key) for manifest in manifests)
        if one != other:
            raise UserError(
                f"--compare: {first} and {second} differ in {field} ({str(one)[:40]}, "
                f"{str(other)[:40]}); compare calibrations that differ in their examples"
            )


def _get_value(manifest: dict, key: str) -> object:
    """Return the value at a key of SAME, or what its absence stands for."""
    value = get_value(manifest, key)
    return ABSENT.get(key) if value is None else value


def _render_page(
    first: Path,
    second: Path,
    manifests: list[dict],
    sides: Mapping[str, Mapping[str, Comparison]],
) -> str:
    """Return the comparison in Markdown: what is compared, then tables by kind and by layer."""
    manifest = manifests[0]
    variant = manifest.get("eigen_select") or manifest.get("corda_mode") or ""
    lines = [
        f"# Angles between two calibrations: {manifest['method']} {variant}".rstrip(),
        "",
        f"{manifest['base']['name']}, rank {manifest['rank']}.",
        "",
    ]
    for folder, one in zip((first, second), manifests, strict=True):
        samples = "no" if one["sample_ids"] is None else str(len(one["sample_ids"]))
        lines.append(f"- {folder}: {samples} examples of {describe_data(one)}, seed {one['seed']}")
    if manifests[0]["seed"] != manifests[1]["seed"]:
        lines += ["", "The seeds differ, which also draw the directions within null spaces."]
    for side, modules in sides.items():
        lines += ["", f"## {side}, in {SIDES[side]}", "", NOTE, "", *_render_kinds(modules)]
        lines += ["", "Median angle by layer:", "", *_render_layers(modules)]
    return "\n".join(lines) + "\n"


def _render_kinds(modules: Mapping[str, Comparison]) -> list[str]:
    """Return a table with a row for each kind of module."""
    lines = ["| module | d | r | median angle | largest angle | overlap | r / d |"]
    lines.append("|---|---|---|---|---|---|---|")
    for kind, names in group_by_kind(modules).items():
        compared = [modules[name] for name in names]
        cells = [f"{kind} ({len(names)})"]
        cells += [
            format_range([getattr(module, key) for module in compared], "d")
            for key in ("size", "rank")
        ]
        for key, form in (("median_angle", ".1f"), ("largest_angle", ".1f"), ("overlap", ".3f")):
            cells.append(format_range([getattr(module, key) for module in compared], form))
        cells.append(format_range([module.rank / module.size for module in compared], ".3f"))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _render_layers(modules: Mapping[str, Comparison]) -> list[str]:
    """Return a table with a row for each layer."""
    kinds = group_by_kind(modules)
    lines = [f"| layer | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    by_kind = [dict(zip(list_layers(names), names, strict=True)) for names in kinds.values()]
    for layer in sorted(set().union(*by_kind)):
        cells = []
        for names in by_kind:
            cells.append(f"{modules[names[layer]].median_angle:.1f}" if layer in names else "")
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return lines
