"""Find published scores for the rows of a table: beside rows of the same protocol only."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from eval.tasks import expand_groups
from launch.config.schema import Recipe
from launch.sweeps.summary import Group
from launch.sweeps.table import TABLES

PUBLISHED = "published.yaml"
# Field of a protocol -> whether its score may be shown where its source does not state the field.
FIELDS = {
    "data": False,
    "rows": False,
    "lr": False,
    "epochs": False,
    "rank": False,
    "batch": True,
    "calibration": True,
    "lr_ratio": False,
}
# Fields that a source states for each method, beside its scores.
METHOD_FIELDS = ("calibration", "lr_ratio")


class Published(NamedTuple):
    """Published scores of one method, on the base and with the method of some row."""

    method: str
    source: str
    scores: dict[str, float]  # benchmark, or `mean` -> percent
    # From the row's protocol; the scores are shown where there are none.
    differences: tuple[str, ...]
    unstated: tuple[str, ...]  # fields that the source does not state

    def describe(self) -> str:
        """Return the source with what it does not state."""
        return self.source + (f" ({', '.join(self.unstated)} not stated)" if self.unstated else "")


def find_published(groups: Sequence[Group], benchmarks: Sequence[str]) -> list[list[Published]]:
    """Find the published scores on the base and with the method of each group, in the file's order.

    Args:
        benchmarks: of the table. Scores of others are left out.

    Returns:
        For each group, its scores of every protocol.
    """
    entries = _read_entries()
    found = []
    for group in groups:
        own = _read_protocol(group.recipe)
        base = strip_name(group.recipe.model.name)
        published = []
        for entry in entries:
            values = dict(entry["scores"].get(_name_method(group), {}))
            protocol = entry["protocol"] | {name: values.pop(name, None) for name in METHOD_FIELDS}
            scores = _choose_scores(values, benchmarks)
            if scores and strip_name(protocol["model"]) == base:
                published.append(_compare(group, entry["source"], scores, protocol, own))
        found.append(published)
    return found


def list_shown(published: Sequence[Published]) -> list[Published]:
    """Return the published scores of the very protocol of their row."""
    return [entry for entry in published if not entry.differences]


def describe_hidden(found: Sequence[Sequence[Published]]) -> list[str]:
    """Say which published scores of the table's bases and methods are not shown, and why."""
    shown = {(entry.source, entry.method) for row in found for entry in list_shown(row)}
    methods: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for row in found:
        for entry in row:
            if (entry.source, entry.method) not in shown:
                names = methods.setdefault((entry.source, entry.differences), [])
                if entry.method not in names:
                    names.append(entry.method)
    lines = []
    for (source, differences), names in methods.items():
        lines.append(f"{source} ({', '.join(names)}): {', '.join(differences)}")
    return lines


def _read_entries() -> list[dict[str, Any]]:
    """Read recipes/tables/published.yaml."""
    return yaml.safe_load((TABLES / PUBLISHED).read_text(encoding="utf-8"))


def _name_method(group: Group) -> str:
    """Return a group's method as sources name it: LoRA+ is LoRA with another rate for B."""
    is_lora_plus = group.recipe.adapter.method == "lora" and group.recipe.train.lr_ratio != 1
    return "lora+" if is_lora_plus else group.method


def _read_protocol(recipe: Recipe) -> dict[str, Any]:
    """Return the protocol of a run, with the fields of FIELDS."""
    data, train = recipe.data, recipe.train
    reads_data = recipe.statistic not in (None, "weight")
    rows = recipe.calibration.data
    return {
        "data": data.label,
        "rows": "all" if data.limit is None else data.limit - data.held_out,
        "lr": train.lr,
        "epochs": train.epochs if train.max_steps is None else f"{train.max_steps} steps",
        "rank": None if recipe.adapter.method_record.trains_all else recipe.adapter.rank,
        "batch": train.global_batch,
        "calibration": (rows.path if rows else "own") if reads_data else None,
        "lr_ratio": None if train.lr_ratio == 1 else train.lr_ratio,
    }


def _choose_scores(values: dict[str, float], benchmarks: Sequence[str]) -> dict[str, float]:
    """Return the scores of the table's benchmarks; a group's mean where the table is that group."""
    scores = {}
    for name, value in values.items():
        if name in benchmarks:
            scores[name] = value
        elif len(benchmarks) > 1 and expand_groups([name]) == list(benchmarks):
            scores["mean"] = value
    return scores


def _compare(
    group: Group,
    source: str,
    scores: dict[str, float],
    protocol: dict[str, Any],
    own: dict[str, Any],
) -> Published:
    """Compare a source's protocol with that of a group's runs."""
    differences, unstated = [], []
    for name, may_be_unstated in FIELDS.items():
        stated, here = protocol[name], own[name]
        if here is None:  # such as the rank of full fine-tuning
            continue
        if stated is None:
            (unstated if may_be_unstated else differences).append(
                name if may_be_unstated else f"{name} not stated"
            )
        elif not _is_same(name, stated, here):
            differences.append(f"{name} {_format(stated)}, here {_format(here)}")
    return Published(group.method, source, scores, tuple(differences), tuple(unstated))


def _is_same(name: str, stated: Any, here: Any) -> bool:
    """Return whether two values of a field are the same."""
    if name in ("data", "calibration"):
        return strip_name(stated) == strip_name(str(here))
    return stated == here


def _format(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def strip_name(name: str) -> str:
    """Return a model's or data set's name in lower case, without owner, folder or format."""
    name = name.rstrip("/").rsplit("/", 1)[-1].lower()
    name = name.removesuffix(".jsonl").removesuffix(".json")
    return name.removesuffix("-hf").removeprefix("meta-")
