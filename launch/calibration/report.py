"""What a calibration saw, to look at: spectrum.json, plots and a page that sums them up."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from astra.eigen import Checks
from astra.spectrum import figures
from launch.calibration import store as artifact
from launch.config.schema import Recipe
from launch.run.plots import COLOURS, figure, save
from launch.runtime.files import write_json, write_text

POINTS = 64  # of an eigenvalue curve in spectrum.json; the files of windows hold them all


def write(folder: Path, recipe: Recipe, reach: Mapping[str, int], tokens: int) -> list[str]:
    """spectrum.json, README.md and plots from the windows in `folder`; lines for the user, warnings among them.

    Args:
        reach: dimensions of its outputs that a module's weight and bias can reach at all.
        tokens: that were counted.
    """
    modules: dict[str, dict] = {}
    spectra: dict[str, Tensor] = {}
    for name, found in artifact.modules(folder):
        spectra[name] = found["spectrum"]
        modules[name] = figures(found["spectrum"], found["values"]) | {
            "reach": reach[name],
            "checks": Checks(*found["checks"].tolist())._asdict(),
            "largest_angle": math.degrees(found["angles"].max().item())
            if len(found["angles"])
            else None,
            "median_angle": math.degrees(found["angles"].median().item())
            if len(found["angles"])
            else None,
            "curve": _curve(found["spectrum"]),
        }
    worst = {
        key: max(module["checks"][key] for module in modules.values()) for key in Checks._fields
    }
    lines = [
        "worst check, 1 being let pass: "
        + ", ".join(f"{key} {value:.1e}" for key, value in worst.items()),
        *doubts(modules, tokens, recipe),
    ]
    write_json(
        folder / artifact.SPECTRUM,
        {
            "tokens": tokens,
            "eigen_select": recipe.adapter.eigen_select,
            "worst_checks": worst,
            "modules": modules,
        },
    )
    plots = [
        _plot_curves(spectra, modules, folder),
        _plot_by_layer("effective_rank", modules, folder),
    ]
    if recipe.calibration.split_half:
        plots.append(_plot_by_layer("largest_angle", modules, folder))
    write_text(folder / "README.md", _page(modules, lines, plots, recipe))
    return lines


def doubts(modules: Mapping[str, dict], tokens: int, recipe: Recipe) -> list[str]:
    """Warnings about subspaces that the calibration's tokens do not determine."""
    if recipe.adapter.eigen_select != "smallest":
        return []
    arbitrary = [
        name
        for name, module in modules.items()
        if tokens < module["reach"] and module["rank"] > module["size"] - module["reach"]
    ]
    if not arbitrary:
        return []
    return [
        f"warning: {tokens} calibration tokens do not determine the tail of {len(arbitrary)} modules, such as "
        f"{arbitrary[0]} of {modules[arbitrary[0]]['size']} outputs: some of its eigenvectors are a choice "
        "within a null space; raise calibration.samples"
    ]


def _curve(spectrum: Tensor) -> dict[str, list]:
    """At most POINTS eigenvalues, at indices evenly spaced in rank: {index: [...], value: [...]}."""
    indices = (
        torch.linspace(0, len(spectrum) - 1, min(POINTS, len(spectrum))).round().long().unique()
    )
    return {"index": indices.tolist(), "value": spectrum[indices].tolist()}


def _by_kind(modules: Mapping[str, dict]) -> dict[str, list[str]]:
    """Names of modules by the last part of the name, each in the model's order."""
    kinds: dict[str, list[str]] = {}
    for name in modules:
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    return kinds


def _plot_curves(spectra: Mapping[str, Tensor], modules: Mapping[str, dict], folder: Path) -> Path:
    """Eigenvalues over their trace, by kind of module, a curve for each layer from dark (first) to light."""
    from matplotlib import colormaps

    kinds = _by_kind(modules)
    columns = min(4, len(kinds))
    of, axes = figure(columns, math.ceil(len(kinds) / columns), 3.2, 2.6)
    for axis, (kind, names) in zip(axes.flat, kinds.items(), strict=False):
        for i, name in enumerate(names):
            curve = spectra[name] / spectra[name].sum()
            shown = curve > 0
            colour = colormaps["viridis"](i / max(1, len(names)))
            axis.semilogy(
                torch.arange(len(curve))[shown], curve[shown], color=colour, linewidth=0.8
            )
        zeros = min(modules[name]["zero_eigenvalues"] for name in names)
        axis.axvline(
            modules[names[0]]["rank"], color=COLOURS[1], linestyle="--", linewidth=1, label="r"
        )
        axis.set(
            title=f"{kind}, {zeros} zeros" if zeros else kind,
            xlabel="index",
            ylabel="share of trace",
        )
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    for axis in axes.flat[len(kinds) :]:
        axis.set_visible(False)
    return save(of, folder / "spectrum.png")


def _plot_by_layer(key: str, modules: Mapping[str, dict], folder: Path) -> Path:
    labels = {
        "effective_rank": "effective rank of the outputs",
        "largest_angle": "largest angle between halves (degrees)",
    }
    of, axes = figure(1, 1, 6, 3.6)
    (axis,) = axes.flat
    axis.set_prop_cycle(color=COLOURS)
    for marker, (kind, names) in zip(
        "osv^DPX" * len(modules), _by_kind(modules).items(), strict=False
    ):
        axis.plot([modules[name][key] for name in names], marker=marker, markersize=4, label=kind)
    axis.set(xlabel="layer", ylabel=labels[key])
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return save(of, folder / f"{key}.png")


def _page(modules: Mapping[str, dict], lines: list[str], plots: list[Path], recipe: Recipe) -> str:
    """README.md of a calibration."""
    split = recipe.calibration.split_half
    head = ["module", "outputs", "r", "zero", "effective rank", "tail energy", "gap at r"]
    head += ["largest angle"] if split else []
    rows = []
    for kind, names in _by_kind(modules).items():

        def spread(key: str, form: str, names: list[str] = names) -> str:
            found = [modules[name][key] for name in names if modules[name][key] is not None]
            if not found:
                return ""
            low, high = f"{min(found):{form}}", f"{max(found):{form}}"
            return low if low == high else f"{low} to {high}"

        row = [
            f"{kind} ({len(names)})",
            spread("size", "d"),
            spread("rank", "d"),
            spread("zero_eigenvalues", "d"),
        ]
        row += [
            spread("effective_rank", ".1f"),
            spread("tail_energy_share", ".1e"),
            spread("gap_at_rank", ".3f"),
        ]
        rows.append(row + ([spread("largest_angle", ".1f")] if split else []))
    table = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
    pictures = "\n".join(f"![{plot.stem.replace('_', ' ')}]({plot.name})" for plot in plots)
    angles = (
        "\nThe angles are between the subspaces of the two halves of the samples: near 0 the calibration set decides "
        "them, near 90 degrees other samples would give others.\n"
        if split
        else ""
    )
    return f"""# Calibration: {recipe.model.name}, eigen_select {recipe.adapter.eigen_select}

{chr(10).join(lines)}

Smallest to largest over the layers. Tail energy: share of the trace in the r smallest eigenvalues. Gap at r:
eigenvalue r over eigenvalue r + 1; near 1 the tail's edge is hardly determined.

{table}
{angles}
{pictures}

`spectrum.json` has every module's figures, `window-*.safetensors` every eigenvalue and the eigenvectors.
"""
