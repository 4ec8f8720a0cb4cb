"""The typed table: which runs a comparison needs, what each of them is called, and which learning rate is a row's own.

A run's folder is named by its row and a hash of its whole resolved recipe. What a changed table, recipe or default
leads to are new folders; the old ones stay and are not looked at.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from eval.tasks import GROUPS, TASKS, expand
from launch.config.schema import (
    RECIPES,
    Name,
    Number,
    Recipe,
    Section,
    find,
    load,
    read,
    section,
    to_yaml,
)
from launch.runtime.errors import UserError

TABLES = RECIPES / "tables"

Rate = Literal["recipe", "own", "common"]
"""Whose learning rate: the recipe's or the row's; the row's best of the grid; the one that all rows share."""


class Row(Section):
    recipe: Name | None = Field(
        None, description="file in recipes/, or a path; the table's when null"
    )
    set: dict[Name, Any] = Field({}, description="overrides of the recipe, field: value")
    rate_factor: Number = Field(
        1.0, gt=0, description="the row's learning rates to choose from, over the table's"
    )


class LearningRates(Section):
    grid: list[Number] = Field(
        min_length=1, description="learning rates to choose each row's own from"
    )
    seed: int = Field(ge=0, description="of the runs it is chosen by, by their held-out loss")
    common: Number = Field(gt=0, description="learning rate that every row is also run at")


class Vary(Section):
    fields: list[Name] = Field(
        min_length=1, description="fields of the recipe that take each of the values together"
    )
    values: list[Any] = Field(min_length=1, description="every row is run at each")


class Table(Section):
    """Rows by label; every row is run with every seed."""

    recipe: Name = Field(description="file in recipes/, or a path")
    set: dict[Name, Any] = Field({}, description="overrides for every row, field: value")
    seeds: list[int] = Field(min_length=1, description="each sets train.seed and calibration.seed")
    learning_rates: LearningRates | None = Field(
        None, description="how rates are chosen; the recipe's when null"
    )
    vary: Vary | None = Field(None, description="a further dimension, such as the rank")
    suites: list[Literal[*TASKS, *GROUPS]] = Field(
        description="columns: benchmarks to score; none is only losses"
    )
    spectra: bool = Field(
        False, description="also the effective ranks before and after, of the first seed's runs"
    )
    rows: dict[Name, Row] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> "Table":
        for name, values in (
            ("seeds", self.seeds),
            ("vary.values", self.vary.values if self.vary else []),
        ):
            if len({json.dumps(value) for value in values}) < len(values):
                raise ValueError(f"{name}: the same value twice")
        return self


class Unit(NamedTuple):
    """A row at one of the values that vary; its runs wait for no other unit's."""

    label: str
    value: Any  # None where nothing varies


@dataclass(frozen=True)
class Run:
    """One run of launch/train.py."""

    name: str  # of its folder
    recipe: Recipe
    arguments: tuple[str, ...]  # of launch/train.py, without --output


@dataclass(frozen=True)
class Sweep:
    """A table with the overrides of a command line, and where its runs are."""

    name: str
    table: Table
    overrides: tuple[str, ...]
    folder: Path

    def units(self) -> list[Unit]:
        """In the table's order: all values of the first row, then of the second."""
        values = self.table.vary.values if self.table.vary else [None]
        return [Unit(label, value) for label in self.table.rows for value in values]

    def grid(self, unit: Unit) -> list[float]:
        """The learning rates that the unit's own is chosen from; none where rates are the recipe's."""
        rates, factor = self.table.learning_rates, self.table.rows[unit.label].rate_factor
        return (
            [float(f"{rate * factor:.6g}") for rate in rates.grid] if rates else []
        )  # 0.1 x 2e-3 is 2e-4

    def run(self, unit: Unit, lr: float | None, seed: int, suites: Sequence[str]) -> Run:
        """The run of a unit. Later settings win: seed, table, row, command line, varied value, rate, suites."""
        row, vary = self.table.rows[unit.label], self.table.vary
        settings = {"train.seed": seed, "calibration.seed": seed} | self.table.set | row.set
        last = dict.fromkeys(vary.fields, unit.value) if vary else {}
        last |= {"train.lr": lr} if lr is not None else {}
        last |= {"eval.suites": list(suites)}
        overrides = [
            *map(_override, settings.items()),
            *self.overrides,
            *map(_override, last.items()),
        ]
        source = row.recipe or self.table.recipe
        recipe = read(source, overrides)
        words = [
            unit.label,
            *([] if unit.value is None else [unit.value]),
            f"lr{recipe.train.lr:g}",
            f"seed{seed}",
        ]
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(map(str, words))).strip("-")
        arguments = (
            "--recipe",
            source,
            *(word for override in overrides for word in ("--set", override)),
        )
        return Run(f"{slug}-{identity(recipe)}", recipe, arguments)

    def choosing(self, unit: Unit) -> dict[float, Run]:
        """The runs by which the unit's learning rate is chosen, by rate: without suites, so that no score can count."""
        return {
            lr: self.run(unit, lr, self.table.learning_rates.seed, []) for lr in self.grid(unit)
        }

    def own_rate(self, unit: Unit) -> float | None:
        """The rate of the grid with the least held-out loss; None until its runs are done, or if all have diverged."""
        losses = {}
        for lr, run in self.choosing(unit).items():
            results = read_results(self.folder / run.name)
            if results is None and not diverged(self.folder / run.name):
                return None
            loss = results["held_out"]["after"]["loss"] if results else math.inf
            losses[lr] = (
                loss if math.isfinite(loss) else math.inf
            )  # min() keeps a NaN that comes first
        best = min(losses, key=losses.get, default=None)
        return None if best is None or losses[best] == math.inf else best

    def scored(self, unit: Unit) -> dict[Rate, list[Run]]:
        """The runs that fill the unit's row, one a seed, by whose rate they are at; no `own` until that is chosen."""
        rates: dict[Rate, float | None] = {"recipe": None}
        if self.table.learning_rates:
            own = self.own_rate(unit)
            rates = {"own": own} if own is not None else {}
            rates["common"] = self.table.learning_rates.common
        return {
            rate: [self.run(unit, lr, seed, self.table.suites) for seed in self.table.seeds]
            for rate, lr in rates.items()
        }


def read_table(source: str, overrides: Sequence[str] = (), output: Path | None = None) -> Sweep:
    """The table called `source` (a file in recipes/tables/, or a path); every run it can lead to has been validated.

    `extends: NAME` in a table takes over the fields of another one that it does not set itself.

    Args:
        overrides: `a.b=value`, for every run. output: where the runs are; runs/tables/NAME when None.

    Raises:
        UserError: unknown table or key, bad value, or what `launch.config.schema.read` finds wrong in a row's recipe.
    """
    path = find(source, TABLES, "--table")
    values, seen = load(path, "--table"), {path}
    while extends := values.pop("extends", None):
        base = find(str(extends), TABLES, "--table")
        if base in seen:
            raise UserError(f"--table: {path} extends itself, through {base.stem}")
        seen.add(base)
        values = load(base, "--table") | values
    table = section(Table, **values)
    sweep = Sweep(path.stem, table, tuple(overrides), output or Path("runs") / "tables" / path.stem)
    for unit in sweep.units():
        try:
            of = [
                *sweep.choosing(unit).values(),
                sweep.run(unit, None, table.seeds[0], table.suites),
            ]
        except UserError as error:
            raise UserError(f"rows.{unit.label}: {error}") from None
        if sweep.grid(unit) and not all(run.recipe.data.held_out for run in of):
            raise UserError(
                f"data.held_out: learning rates of {path.stem} are chosen by it; set it in the table"
            )
    return sweep


def identity(recipe: Recipe) -> str:
    """Ten characters that stand for everything in a resolved recipe."""
    return hashlib.sha256(to_yaml(recipe).encode()).hexdigest()[:10]


def read_results(folder: Path) -> dict | None:
    """results.json of a run; None if it has not finished."""
    path = folder / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def diverged(folder: Path) -> bool:
    """Whether a run ended because its loss was not finite: another start would end so too."""
    path = folder / "state.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["state"] == "diverged"


def columns(table: Table) -> list[str]:
    """The suites that are scored, groups spelled out."""
    return expand(table.suites)


def _override(item: tuple[str, Any]) -> str:
    return f"{item[0]}={json.dumps(item[1])}"  # JSON is YAML
