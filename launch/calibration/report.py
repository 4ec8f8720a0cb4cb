"""Write what a calibration saw, for people: spectrum.json, plots, and a page that sums them up."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from astra.eigen import Checks, make_generator, select_indices
from astra.spectrum import summarise_spectrum
from astra.targets import names_module
from launch.calibration.store import SPECTRUM, read_solutions
from launch.config.schema import Recipe
from launch.run.plots import COLOURS, make_figure, save_figure
from launch.runtime.files import write_json, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osv^DPX"  # of the kinds of modules in plots by layer
MAX_POINTS = 64  # of an eigenvalue curve in spectrum.json; the files of the windows hold them all
# Figure of a module in spectrum.json that is plotted by layer -> label of its axis.
LAYER_LABELS = {
    "effective_rank": "effective rank of the outputs",
    "largest_angle": "largest angle between halves (degrees)",
}
# Column of the page -> figure of a module in spectrum.json, and how it is printed.
PAGE_COLUMNS = {
    "outputs": ("size", "d"),
    "r": ("rank", "d"),
    "zero": ("zero_eigenvalues", "d"),
    "effective rank": ("effective_rank", ".1f"),
    "tail energy": ("tail_energy_share", ".1e"),
    "gap at r": ("gap_at_rank", ".3f"),
}
ANGLE_COLUMN = {"largest angle": ("largest_angle", ".1f")}
ANGLE_NOTE = (
    "\nThe angles are between the subspaces of the two halves of the samples: near 0 the "
    "calibration set decides them, near 90 degrees other samples would give others.\n"
)


def write_report(
    folder: Path, recipe: Recipe, reach: Mapping[str, int], num_tokens: int
) -> list[str]:
    """Write spectrum.json, README.md and plots from the windows in `folder`.

    Args:
        reach: module -> the dimensions of its outputs that its weight and bias can reach at all.
        num_tokens: that were calibrated on.

    Returns:
        Lines to print, warnings among them.
    """
    modules: dict[str, dict] = {}
    spectra: dict[str, Tensor] = {}
    for name, solution in read_solutions(folder):
        spectra[name] = solution["spectrum"]
        modules[name] = _describe_module(solution, reach[name])
    worst = {}
    for key in Checks._fields:
        worst[key] = max(module["checks"][key] for module in modules.values())
    checks = ", ".join(f"{key} {value:.1e}" for key, value in worst.items())
    lines = [f"worst check, 1 being let pass: {checks}"]
    lines += list_warnings(modules, num_tokens, recipe)

    spectrum = {
        "tokens": num_tokens,
        "eigen_select": recipe.adapter.eigen_select,
        "worst_checks": worst,
        "modules": modules,
    }
    write_json(folder / SPECTRUM, spectrum)
    plots = [
        _plot_spectra(spectra, modules, folder),
        _plot_figure("effective_rank", modules, folder),
    ]
    if recipe.calibration.split_half:
        plots.append(_plot_figure("largest_angle", modules, folder))
    write_text(folder / "README.md", _write_page(modules, lines, plots, recipe))
    return lines


def _describe_module(solution: Mapping[str, Tensor], reach: int) -> dict:
    """Return a module's figures for spectrum.json from its solution."""
    angles = solution["angles"]  # empty without split_half
    largest = math.degrees(angles.max().item()) if len(angles) else None
    median = math.degrees(angles.median().item()) if len(angles) else None
    return summarise_spectrum(solution["spectrum"], solution["values"]) | {
        "reach": reach,
        "checks": Checks(*solution["checks"].tolist())._asdict(),
        "largest_angle": largest,
        "median_angle": median,
        "curve": _thin_out(solution["spectrum"]),
    }


def list_warnings(modules: Mapping[str, dict], num_tokens: int, recipe: Recipe) -> list[str]:
    """Return warnings about subspaces that the calibration's tokens do not determine.

    The output moment of fewer tokens than dimensions has a null space that more tokens would
    narrow, and which of its vectors are taken is a choice. Dimensions that the weight cannot reach
    are in the null space whatever the tokens, so vectors within them do not depend on the tokens.

    Args:
        modules: module -> its figures in spectrum.json.
    """
    select, seed = recipe.adapter.eigen_select, recipe.calibration.seed
    undetermined = []
    for name, module in modules.items():
        size, unreachable = module["size"], module["size"] - module["reach"]
        indices = select_indices(select, size, module["rank"], make_generator(seed, name))
        # In ascending order: what the weight cannot reach, then what too few tokens leave out.
        if ((indices >= unreachable) & (indices < size - num_tokens)).any():
            undetermined.append(name)
    if not undetermined:
        return []
    first = undetermined[0]
    return [
        f"warning: {num_tokens} calibration tokens do not determine the {select} eigenvectors of "
        f"{len(undetermined)} modules, such as {first} of {modules[first]['size']} outputs: some "
        "of them are a choice within a null space; raise calibration.samples"
    ]


def _thin_out(spectrum: Tensor) -> dict[str, list]:
    """Return at most MAX_POINTS eigenvalues, evenly spaced by index, as `index` and `value`."""
    num_points = min(MAX_POINTS, len(spectrum))
    indices = torch.linspace(0, len(spectrum) - 1, num_points).round().long().unique()
    return {"index": indices.tolist(), "value": spectrum[indices].tolist()}


def group_by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names of modules by their last part, such as `q_proj`, in the given order."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kind = name.rsplit(".", 1)[-1]
        kinds.setdefault(kind, []).append(name)
    return kinds


def list_layers(names: Sequence[str]) -> list[int]:
    """Return the layer of each module of one kind: the first number in its name.

    If some have none, or several are of one layer, as experts are: their places in `names`.
    """
    numbers = [next(filter(str.isdigit, name.split(".")), None) for name in names]
    is_distinct = None not in numbers and len(set(numbers)) == len(names)
    return [int(number) for number in numbers] if is_distinct else list(range(len(names)))


def place_module(name: str, targets: list[str]) -> tuple[list[int], int, str]:
    """Return a sort key: the numbers in a module's name, then its kind's place in `targets`."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    kinds = (i for i, target in enumerate(targets) if names_module(target, name))
    kind = next(kinds, len(targets))  # all-linear names none
    return numbers, kind, name


def _plot_spectra(spectra: Mapping[str, Tensor], modules: Mapping[str, dict], folder: Path) -> Path:
    """Draw spectrum.png, with a panel for each kind of module."""
    kinds = group_by_kind(modules)
    num_columns = min(4, len(kinds))
    figure, axes = make_figure(num_columns, math.ceil(len(kinds) / num_columns), 3.2, 2.6)
    for axis, (kind, names) in zip(axes.flat, kinds.items(), strict=False):
        _draw_spectra(axis, [spectra[name] for name in names])
        axis.axvline(
            modules[names[0]]["rank"], color=COLOURS[1], linestyle="--", linewidth=1, label="r"
        )
        zeros = min(modules[name]["zero_eigenvalues"] for name in names)
        title = f"{kind}, {zeros} zeros" if zeros else kind
        axis.set(title=title, xlabel="index", ylabel="share of trace")
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    for axis in axes.flat[len(kinds) :]:
        axis.set_visible(False)
    return save_figure(figure, folder / "spectrum.png")


def _draw_spectra(axis: "Axes", spectra: Sequence[Tensor]) -> None:
    """Draw eigenvalues over their trace, a curve for each layer from dark (the first) to light."""
    from matplotlib import colormaps

    for i, spectrum in enumerate(spectra):
        shares = spectrum / spectrum.sum()
        is_shown = shares > 0  # the axis is logarithmic
        colour = colormaps["viridis"](i / max(1, len(spectra)))
        indices = torch.arange(len(shares))[is_shown]
        axis.semilogy(indices, shares[is_shown], color=colour, linewidth=0.8)


def _plot_figure(key: str, modules: Mapping[str, dict], folder: Path) -> Path:
    """Draw the figure `key` of spectrum.json by layer."""
    values = {name: module[key] for name, module in modules.items()}
    return plot_by_layer(values, LAYER_LABELS[key], folder / f"{key}.png")


def plot_by_layer(modules: Mapping[str, float], label: str, path: Path) -> Path:
    """Draw a number of all modules by layer, with a line for each kind, and return `path`."""
    figure, axes = make_figure(1, 1, 6, 3.6)
    (axis,) = axes.flat
    axis.set_prop_cycle(color=COLOURS)
    for i, (kind, names) in enumerate(group_by_kind(modules).items()):
        values = [modules[name] for name in names]
        axis.plot(
            list_layers(names), values, marker=MARKERS[i % len(MARKERS)], markersize=4, label=kind
        )
    axis.set(xlabel="layer", ylabel=label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return save_figure(figure, path)


def _write_page(
    modules: Mapping[str, dict], lines: list[str], plots: list[Path], recipe: Recipe
) -> str:
    """Return the text of a calibration's README.md."""
    is_split = recipe.calibration.split_half
    columns = PAGE_COLUMNS | (ANGLE_COLUMN if is_split else {})
    rows = [["module", *columns]]
    rows.append(["---"] * len(rows[0]))
    for kind, names in group_by_kind(modules).items():
        row = [f"{kind} ({len(names)})"]
        for key, form in columns.values():
            row.append(format_range([modules[name][key] for name in names], form))
        rows.append(row)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    pictures = "\n".join(f"![{plot.stem.replace('_', ' ')}]({plot.name})" for plot in plots)
    angles = ANGLE_NOTE if is_split else ""
    return f"""# Calibration: {recipe.model.name}, eigen_select {recipe.adapter.eigen_select}

{chr(10).join(lines)}

Smallest to largest over the layers. Tail energy: share of the trace in the r smallest eigenvalues. Gap at r:
eigenvalue r over eigenvalue r + 1; near 1 the tail's edge is hardly determined.

{table}
{angles}
{pictures}

`spectrum.json` has every module's figures, `window-*.safetensors` every eigenvalue and the eigenvectors.
"""


def format_range(values: Iterable[float | None], form: str) -> str:
    """Return the least and the greatest of the values that are not None, or an empty text."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = f"{min(known):{form}}", f"{max(known):{form}}"
    return low if low == high else f"{low} to {high}"
