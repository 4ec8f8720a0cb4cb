"""A table's runs, grouped over seeds: means, intervals, and which best is better than the next beyond chance.

Means have 95 % intervals of Student's t over the seeds. The best mean of a column is marked only where a two-sided test
of it against the next best gives p < 0.05: a paired t-test where both groups have the same seeds (runs of one seed
share the order of the rows), Welch's t-test otherwise. One seed decides nothing, and neither do differences without
spread: few seeds with coarse scores give equal ones by chance.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from scipy import stats

from launch.config.schema import Recipe
from launch.run.plots import Point
from launch.runtime.errors import UserError
from launch.sweeps.table import TABLES, Rate, Sweep, columns, diverged, read_results

LEVEL = 0.05
ROUNDING = 1e-9  # relative: numbers that are no further apart are equal
GIB = 2**30


class Column(NamedTuple):
    """A number of a run."""

    title: str
    of: Callable[[dict], float | None]  # results.json -> the number; None where the run has none
    form: str = ".1f"
    better: Literal["high", "low"] | None = None


@dataclass(frozen=True)
class Group:
    """The runs of one row at one value and rate."""

    label: str
    value: Any  # None where nothing varies
    rate: Rate
    lr: float | None  # None where no run is there yet
    at_edge: bool  # its own rate is the least or greatest of its grid
    wanted: int  # seeds
    diverged: int
    results: dict[int, dict]  # seed -> results.json
    folders: dict[int, str]  # seed -> run folder
    adapter: dict  # of the resolved recipe
    model: str

    def numbers(self, column: Column) -> dict[int, float]:
        """Seed -> number, of the runs that have it."""
        found = {seed: column.of(results) for seed, results in self.results.items()}
        return {seed: value for seed, value in found.items() if value is not None}


def mean_interval(values: Sequence[float]) -> Point | None:
    """The mean and half of its 95 % interval of Student's t; no interval for one value, None for none."""
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Point(mean, None)
    return Point(mean, float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)))


def differ(first: dict[int, float], second: dict[int, float]) -> bool:
    """Whether the means of two groups (seed -> number) differ at LEVEL; see this file's beginning for the test."""
    if min(len(first), len(second)) < 2:
        return False
    paired = first.keys() == second.keys()
    samples = (
        [[first[seed] - second[seed] for seed in first]]
        if paired
        else [[*first.values()], [*second.values()]]
    )
    size = max(map(abs, [*first.values(), *second.values()]))
    if all(max(of) - min(of) <= ROUNDING * size for of in samples):  # no spread to test against
        return False
    test = stats.ttest_1samp(*samples, 0) if paired else stats.ttest_ind(*samples, equal_var=False)
    return bool(test.pvalue < LEVEL)


def best(groups: Sequence[Group], column: Column) -> int | None:
    """Index of the group whose mean is best and differs from the next best; None if there is none."""
    numbers = {i: found for i, group in enumerate(groups) if (found := group.numbers(column))}
    means = {i: mean_interval(list(found.values())).mean for i, found in numbers.items()}
    order = sorted(
        (i for i in means if math.isfinite(means[i])), key=means.get
    )  # NaN has no place in an order
    if column.better is None or len(order) < 2:
        return None
    first, second = order[:2] if column.better == "low" else order[:-3:-1]
    return first if differ(numbers[first], numbers[second]) else None


def collect(sweep: Sweep) -> list[Group]:
    """Every group of the table, those at own rates first, then in the table's order.

    Raises UserError if runs whose recipes have the same model, data or benchmarks were made with other content of them.
    """
    _check_inputs(sweep)
    groups = []
    for unit in sweep.units():
        for rate, runs in sweep.scored(unit).items():
            folders = {run.recipe.train.seed: sweep.folder / run.name for run in runs}
            found = {
                seed: results
                for seed, folder in folders.items()
                if (results := read_results(folder))
            }
            grid, recipe = sweep.grid(unit), runs[0].recipe
            groups.append(
                Group(
                    label=unit.label,
                    value=unit.value,
                    rate=rate,
                    lr=recipe.train.lr,
                    at_edge=rate == "own"
                    and len(grid) > 1
                    and recipe.train.lr in (min(grid), max(grid)),
                    wanted=len(runs),
                    diverged=sum(map(diverged, folders.values())),
                    results=found,
                    folders={seed: str(folder) for seed, folder in folders.items()},
                    adapter=recipe.adapter.model_dump(),
                    model=recipe.model.name,
                )
            )
    return sorted(groups, key=lambda group: group.rate != "own")


def _check_inputs(sweep: Sweep) -> None:
    seen: dict[str, tuple[str, Path]] = {}
    for unit in sweep.units():
        for run in (
            *sweep.choosing(unit).values(),
            *(run for of in sweep.scored(unit).values() for run in of),
        ):
            folder = sweep.folder / run.name
            for name, fields, content in _inputs(run.recipe, read_results(folder) or {}):
                if content is None:  # made before this was recorded, or without it
                    continue
                first, where = seen.setdefault(json.dumps([name, fields]), (content, folder))
                if content != first:
                    raise UserError(
                        f"--table: {folder} was made with another {name} than {where} ({content[:12]}, not "
                        f"{first[:12]}); remove the older runs, or give --output another folder"
                    )


def _inputs(recipe: Recipe, results: dict) -> Iterator[tuple[str, list, str | None]]:
    """What a run was made with: what it is, the values in its recipe that decide it, and what it was."""
    model, data, settings = recipe.model, recipe.data, recipe.eval
    weights = [model.name, model.revision]
    yield f"content of model.name {model.name}", weights, _at(results, "base", "weights_sha256")
    yield (
        f"content of data.path {data.path}",
        [weights, data.of_tokens()],
        _at(results, "data", "tokens_sha256"),
    )
    yield "dtype", [model.dtype], results.get("dtype")
    yield (
        f"content of eval.other_text {settings.other_text}",
        [],
        _at(results, "other_text_source", "sha256"),
    )
    for suite, score in results.get("scores", {}).items():
        yield (
            f"content of suite {suite}",
            [settings.data_dir, settings.limit],
            score.get("data_sha256"),
        )


def table_columns(sweep: Sweep, groups: Sequence[Group]) -> list[Column]:
    """The table's columns: suites first; those of which no run has a number are left out, suites are not."""
    suites = [
        Column(f"{suite} (%)", lambda results, suite=suite: _score(results, suite), ".1f", "high")
        for suite in columns(sweep.table)
    ]
    if len(suites) > 1:
        suites.append(
            Column(
                "mean (%)",
                lambda results: _mean_score(results, columns(sweep.table)),
                ".1f",
                "high",
            )
        )
    others = [
        Column(
            "held-out loss", lambda results: _at(results, "held_out", "after", "loss"), ".4f", "low"
        ),
        Column(
            "other-text loss before",
            lambda results: _at(results, "other_text", "before", "loss"),
            ".3f",
        ),
        Column(
            "other-text loss after",
            lambda results: _at(results, "other_text", "after", "loss"),
            ".3f",
            "low",
        ),
        Column(
            "other-text accuracy before (%)",
            lambda results: _percent(results, "other_text", "before", "accuracy"),
            ".1f",
        ),
        Column(
            "other-text accuracy after (%)",
            lambda results: _percent(results, "other_text", "after", "accuracy"),
            ".1f",
            "high",
        ),
        Column(
            "trained parameters (M)",
            lambda results: _scaled(results.get("trained_parameters"), 1e6),
            ".3f",
        ),
        Column("calibration (s)", lambda results: results["seconds"]["calibration"], ".1f"),
        Column("training (s)", lambda results: results["seconds"]["training"], ".1f"),
        Column(
            "peak memory (GiB)",
            lambda results: _scaled(max(results.get("peak_memory") or [0]), GIB),
            ".2f",
        ),
    ]
    return suites + [column for column in others if any(group.numbers(column) for group in groups)]


def published(groups: Sequence[Group], suites: Sequence[str]) -> dict[int, dict[str, dict]]:
    """Index of a group -> suite -> {value, source}: the published number for its model, method and rank."""
    entries = yaml.safe_load((TABLES / "published.yaml").read_text(encoding="utf-8"))
    found: dict[int, dict[str, dict]] = {}
    for i, group in enumerate(groups):
        for entry in entries:
            if (
                _plain(entry["model"]) == _plain(group.model)
                and entry["method"] == method_of(group.adapter)
                and entry["rank"] == group.adapter["rank"]
            ):
                of = {
                    suite: {"value": value, "source": entry["source"]}
                    for suite, value in entry["scores"].items()
                }
                found.setdefault(i, {}).update(
                    {suite: of[suite] for suite in suites if suite in of}
                )
    return found


def method_of(adapter: dict) -> str:
    """A method with the choice within it, which is never left out: `astra smallest`, `corda ipm`."""
    choice = {"astra": "eigen_select", "corda": "corda_mode"}.get(adapter["method"])
    return f"{adapter['method']} {adapter[choice]}" if choice else adapter["method"]


def _plain(model: str) -> str:
    """A model's name without owner, folder or format."""
    return model.rstrip("/").rsplit("/", 1)[-1].lower().removesuffix("-hf").removeprefix("meta-")


def _score(results: dict, suite: str) -> float | None:
    score = results["scores"].get(suite)
    return None if score is None else 100 * score["accuracy"]


def _mean_score(results: dict, suites: Sequence[str]) -> float | None:
    found = [_score(results, suite) for suite in suites]
    return None if None in found else sum(found) / len(found)


def _at(results: dict, *keys: str) -> float | None:
    value: Any = results
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _percent(results: dict, *keys: str) -> float | None:
    value = _at(results, *keys)
    return None if value is None else 100 * value


def _scaled(value: float | None, unit: float) -> float | None:
    return value / unit if value else None
