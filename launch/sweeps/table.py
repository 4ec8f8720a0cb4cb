"""Read a table: which runs a comparison needs, their folders' names, and each row's learning rate.

A run's folder is named by its row and a hash of its whole resolved recipe. A change of the table,
of a recipe or of a default leads to new folders. The old ones stay and are ignored.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from eval.tasks import BENCHMARKS, GROUPS, expand_groups
from launch.config.loading import (
    RECIPES,
    dump_for_hash,
    find_yaml,
    load_extended,
    read_recipe,
    validate_section,
)
from launch.config.overrides import parse_override
from launch.config.schema import Name, Number, Recipe, Section
from launch.run.folder import read_state
from launch.run.results import RESULTS, find_run_results
from launch.runtime.errors import UserError
from launch.sweeps.rates import choose_next_rate, find_best_rate, find_neighbours, make_grid

TABLES = RECIPES / "tables"
# Folders of the results that are committed, one for each table that has some.
KEPT = RECIPES.parent / "docs" / "results"
MAX_SLUG = 100  # characters of a run's name before its hash
# Significant digits of a learning rate times rate_factor. 0.1 * 2e-5 is 2.0000000000000003e-6 in
# floating point and must become exactly 2e-6, because the recipe's hash names the folder.
SIGNIFICANT_DIGITS = 6

Rate = Literal["recipe", "own", "below", "above", "common"]
"""Which learning rate a group of runs is at.

`recipe`: the recipe's or the row's. `own`: the best of the row's grid. `below`, `above`: the
neighbours of that one in the grid. `common`: one for all rows.
"""


class Row(Section):
    """A row of a table: the settings that tell it from the other rows."""

    recipe: Name | None = Field(
        None, description="file in recipes/, or a path; the table's when null"
    )
    set: dict[Name, Any] = Field({}, description="overrides of the recipe, field: value")
    rate_factor: Number = Field(
        1.0, gt=0, description="factor on the table's grid of learning rates, for this row"
    )


class LearningRates(Section):
    """How each row's learning rate is chosen."""

    grid: list[Annotated[Number, Field(gt=0)]] = Field(
        min_length=1, description="learning rates to choose each row's own from"
    )
    extend: bool = Field(
        False,
        description="add the next rate at an end of a row's grid, at its own spacing, while its best "
        "is there",
    )
    seed: int = Field(ge=0, description="seed of the runs whose held-out loss chooses the rate")
    set: dict[Name, Any] = Field(
        {}, description="overrides of the runs that choose, field: value, such as fewer rows"
    )
    neighbours: bool = Field(
        False, description="run every seed at the rates next to a row's own too"
    )
    common: Number | None = Field(
        None, gt=0, description="learning rate that every row is also run at; none when null"
    )


class Vary(Section):
    """A further dimension of a table: every row is run at each of its values."""

    fields: list[Name] = Field(
        min_length=1, description="fields of the recipe that take each of the values together"
    )
    values: list[Any] = Field(min_length=1, description="every row is run at each")


class Table(Section):
    """Rows by label; every row is run with every seed."""

    recipe: Name = Field(description="file in recipes/, or a path")
    set: dict[Name, Any] = Field({}, description="overrides for every row, field: value")
    seeds: list[int] = Field(
        min_length=1,
        description="each sets train.seed, and calibration.seed unless an override sets that",
    )
    learning_rates: LearningRates | None = Field(
        None, description="how rates are chosen; the recipe's when null"
    )
    vary: Vary | None = Field(None, description="a further dimension, such as the rank")
    suites: list[Literal[*BENCHMARKS, *GROUPS]] = Field(
        description="columns: benchmarks to score; none is only losses"
    )
    spectra: bool = Field(
        False, description="also the effective ranks before and after, of the first seed's runs"
    )
    rows: dict[Name, Row] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_values_are_distinct(self) -> "Table":
        lists = {"seeds": self.seeds, "vary.values": self.vary.values if self.vary else []}
        for name, values in lists.items():
            if len({json.dumps(value) for value in values}) < len(values):
                raise ValueError(f"{name}: the same value twice")
        return self

    @model_validator(mode="after")
    def _check_learning_rates(self) -> "Table":
        rates = self.learning_rates
        if rates is None:
            for label, row in self.rows.items():
                if row.rate_factor != 1:
                    raise ValueError(
                        f"rows.{label}.rate_factor: {row.rate_factor:g} is for the grid of "
                        "learning_rates, which is not set; leave it out and set the row's train.lr (where "
                        "the rows are another table's, write `rows` again)"
                    )
            return self
        if rates.seed in self.seeds:
            raise ValueError(
                f"learning_rates.seed: {rates.seed} is one of `seeds` too, and the run that chose "
                "a rate cannot judge it; take another"
            )
        if len(set(rates.grid)) < len(rates.grid):
            raise ValueError("learning_rates.grid: the same value twice")
        for label, row in self.rows.items():
            if rates.extend:
                try:
                    make_grid(rates.grid, row.rate_factor)
                except ValueError as error:
                    raise ValueError(f"learning_rates.grid: {error} (row {label})") from None
        return self

    @model_validator(mode="after")
    def _check_settings_are_used(self) -> "Table":
        decided = self.list_decided()
        for source, name, value in self._list_settings():
            for changed in _list_fields(name, value):
                if changed in decided:
                    raise ValueError(
                        f"{source}: {changed} follows from `{decided[changed]}` of the table; leave "
                        "it out"
                    )
        return self

    @model_validator(mode="after")
    def _check_rows_keep_their_settings(self) -> "Table":
        later = {
            "vary.fields": self.vary.fields if self.vary else [],
            "learning_rates.set": self.learning_rates.set if self.learning_rates else {},
        }
        for source, fields in later.items():
            for changed in fields:
                setting = self.find_row_setting(changed)
                if setting is not None:
                    raise ValueError(
                        f"{source}: {changed} overrules {setting}; leave one of them out"
                    )
        return self

    def list_decided(self) -> dict[str, str]:
        """Return the fields of a recipe that the table sets for every run -> its own field for that."""
        rates = {"train.lr": "learning_rates"} if self.learning_rates else {}
        return {"eval.suites": "suites"} | rates

    def _list_settings(self) -> list[tuple[str, str, Any]]:
        """List every setting of the table: where it stands, the field or section, the value."""
        settings = {"set": self.set}
        settings |= {f"rows.{label}.set": row.set for label, row in self.rows.items()}
        if self.learning_rates:
            settings["learning_rates.set"] = self.learning_rates.set
        found = []
        for source, values in settings.items():
            found += [(source, name, value) for name, value in values.items()]
        for name in self.vary.fields if self.vary else []:
            found += [("vary", name, value) for value in self.vary.values]
        return found

    def find_row_setting(self, changed: str) -> str | None:
        """Return the first setting of a row that a new value of the field `changed` would overrule.

        Args:
            changed: a field, a section, or what is inside of a field.
        """
        for label, row in self.rows.items():
            for name in row.set:
                if f"{changed}.".startswith(f"{name}.") or f"{name}.".startswith(f"{changed}."):
                    return f"rows.{label}.set: {name}"
        return None


class Cell(NamedTuple):
    """A row at one of the values that vary. Its runs do not wait for those of other cells."""

    label: str  # of the row
    value: Any  # None where nothing varies

    @property
    def name(self) -> str:
        """The row, with its value where something varies."""
        return self.label if self.value is None else f"{self.label} {self.value}"


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
    folder: Path  # of the run folders
    kept: Path  # folder with the small files of finished runs, which are not run again
    options: tuple[str, ...]  # that name the sweep on a command line, as they were given
    _runs: dict[str, "Run"] = field(default_factory=dict, compare=False, repr=False)  # made so far

    def list_cells(self) -> list[Cell]:
        """List the cells in the table's order: all values of the first row, then of the second."""
        values = self.table.vary.values if self.table.vary else [None]
        return [Cell(label, value) for label in self.table.rows for value in values]

    def make_rate_grid(self, cell: Cell) -> list[float]:
        """Return the rates from which the choice of the cell's own starts; none if there is none."""
        rates = self.table.learning_rates
        if rates is None:
            return []
        factor = self.table.rows[cell.label].rate_factor
        if rates.extend:
            return make_grid(rates.grid, factor)
        return [float(f"{rate * factor:.{SIGNIFICANT_DIGITS}g}") for rate in rates.grid]

    def make_run(
        self,
        cell: Cell,
        lr: float | None,
        seed: int,
        benchmarks: Sequence[str],
        settings: Mapping[str, Any] | None = None,
    ) -> Run:
        """Resolve the recipe of a run and name its folder.

        Of two settings of a field the later one wins: seed, table, row, command line, varied value,
        `settings`, learning rate, benchmarks.

        Args:
            lr: None for the recipe's or the row's.
            benchmarks: that the run is scored on.
            settings: overrides of this run, field: value.

        Raises:
            UserError: what `read_recipe` finds wrong in the recipe, or it has another seed.
        """
        # Resolving a recipe takes milliseconds, and a sweep asks for all runs whenever one ends.
        key = json.dumps([cell, lr, seed, list(benchmarks), settings or {}])
        if key not in self._runs:
            self._runs[key] = self._resolve_run(cell, lr, seed, benchmarks, settings or {})
        return self._runs[key]

    def _resolve_run(
        self,
        cell: Cell,
        lr: float | None,
        seed: int,
        benchmarks: Sequence[str],
        settings: Mapping[str, Any],
    ) -> Run:
        """Resolve one run, without the cache of `make_run`."""
        row, vary = self.table.rows[cell.label], self.table.vary
        first = {"train.seed": seed, "calibration.seed": seed} | self.table.set | row.set
        last = dict.fromkeys(vary.fields, cell.value) if vary else {}
        last |= settings
        if lr is not None:
            last["train.lr"] = lr
        last["eval.suites"] = list(benchmarks)
        overrides = [*_to_overrides(first), *self.overrides, *_to_overrides(last)]
        source = row.recipe or self.table.recipe
        recipe = read_recipe(source, overrides)
        _check_seeds(recipe, seed, overrides)

        words = [cell.label] if cell.value is None else [cell.label, str(cell.value)]
        words += [f"lr{recipe.train.lr:g}", f"seed{seed}"]
        # Cut, since a whole section may vary; the hash tells runs apart.
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(words)).strip("-")[:MAX_SLUG]
        arguments = ["--recipe", source]
        for override in overrides:
            arguments += ["--set", override]
        return Run(f"{slug}-{hash_recipe(recipe)}", recipe, tuple(arguments))

    def find_folder(self, run: Run) -> Path:
        """Return the folder with the files of a run: where it is kept, else where it is made.

        A kept run comes first, so that a report is the same with and without the run folders.
        """
        kept = self.kept / run.name
        return kept if has_ended(kept) else self.folder / run.name

    def read_tuning_losses(self, cell: Cell) -> dict[float, float | None]:
        """Return the loss at each rate that the cell's own is chosen from, in ascending order.

        With `extend` these are the rates of the grid and those that the results so far lead to, so
        the same results lead to the same rates, whenever a sweep was stopped.

        Returns:
            Learning rate -> held-out loss on the seed that chooses; infinite where that is not
            finite or the run diverged, None where the run has not ended.
        """
        losses: dict[float, float | None] = {}
        waiting = self.make_rate_grid(cell)
        while waiting:
            for rate in waiting:
                losses[rate] = self._read_tuning_loss(cell, rate)
            waiting = []
            if self.table.learning_rates.extend and None not in losses.values():
                further = choose_next_rate(losses)
                waiting = [] if further is None else [further]
        return dict(sorted(losses.items()))

    def _read_tuning_loss(self, cell: Cell, rate: float) -> float | None:
        """Return what `read_tuning_losses` gives for one rate."""
        folder = self.find_folder(self._make_tuning_run(cell, rate))
        results = find_run_results(folder)
        if results is None:
            return math.inf if has_diverged(folder) else None
        loss = math.inf if results.held_out is None else results.held_out.after.loss
        return loss if math.isfinite(loss) else math.inf  # min() would keep a NaN that comes first

    def _make_tuning_run(self, cell: Cell, rate: float) -> Run:
        """Return the run that measures one rate.

        It is scored on no benchmark, and neither a benchmark nor development rows choose its step
        (`_resolve_runs`), so no score can influence the choice.
        """
        settings = self.table.learning_rates
        return self.make_run(cell, rate, settings.seed, [], settings.set)

    def list_tuning_runs(self, cell: Cell) -> dict[float, Run]:
        """Return the runs that choose the cell's learning rate, as known so far, by rate."""
        return {rate: self._make_tuning_run(cell, rate) for rate in self.read_tuning_losses(cell)}

    def choose_rate(self, cell: Cell) -> float | None:
        """Return the learning rate with the least held-out loss, the lowest of equal ones.

        Returns:
            None until all tuning runs have ended, or if all of them have diverged.
        """
        return find_best_rate(self.read_tuning_losses(cell))

    def list_eval_runs(self, cell: Cell) -> dict[Rate, list[Run]]:
        """Return the runs that fill the cell, one per seed, keyed by `Rate`.

        The keys `own`, `below` and `above` are missing until that learning rate is chosen.
        """
        rates: dict[Rate, float | None] = {}
        settings = self.table.learning_rates
        if settings is None:
            rates["recipe"] = None
        else:
            losses = self.read_tuning_losses(cell)
            own = find_best_rate(losses)
            if own is not None:
                rates["own"] = own
                if settings.neighbours:
                    below, above = find_neighbours(list(losses), own)
                    rates |= {"below": below, "above": above}
            rates["common"] = settings.common
            rates = {rate: lr for rate, lr in rates.items() if lr is not None}
        runs = {}
        for rate, lr in rates.items():
            runs[rate] = [
                self.make_run(cell, lr, seed, self.table.suites) for seed in self.table.seeds
            ]
        return runs

    def list_runs(self, cell: Cell) -> list[Run]:
        """List the cell's runs that are known so far: for tuning, then for evaluation.

        A run may be in the list twice, where two of the learning rates are the same.
        """
        runs = list(self.list_tuning_runs(cell).values())
        for group in self.list_eval_runs(cell).values():
            runs += group
        return runs

    def list_all_runs(self, cells: Sequence[Cell] | None = None) -> list[Run]:
        """List the runs that are known so far, each once.

        Args:
            cells: whose runs; all when None.
        """
        runs: dict[str, Run] = {}
        for cell in self.list_cells() if cells is None else cells:
            runs |= {run.name: run for run in self.list_runs(cell)}
        return list(runs.values())


def read_table(
    source: str,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    kept: Path | None = None,
) -> Sweep:
    """Read a table and validate the recipes of its runs, before any of them is launched.

    `extends: NAME` in a table takes over the fields of another one that it does not set itself.

    Args:
        source: name of a file in recipes/tables/, or a path to one.
        overrides: `a.b=value`, for every run.
        output: folder of the runs; runs/tables/NAME when None.
        kept: folder with the small files of finished runs; docs/results/NAME when None.

    Raises:
        UserError: unknown table or key, bad value, an override of what the table decides, or what
            `read_recipe` finds wrong in a row's recipe.
    """
    path = find_yaml(source, TABLES, "--table")
    table = validate_section(Table, _load_table(path))
    _check_overrides(table, overrides)
    sweep = Sweep(
        name=path.stem,
        table=table,
        overrides=tuple(overrides),
        folder=output or Path("runs") / "tables" / path.stem,
        kept=kept or KEPT / path.stem,
        options=_list_options(source, overrides, output, kept),
    )
    for cell in sweep.list_cells():
        try:
            runs = _resolve_runs(sweep, cell)
        except UserError as error:
            raise UserError(f"rows.{cell.label}: {error}") from None
        if table.learning_rates and not all(run.recipe.data.held_out for run in runs):
            raise UserError(
                f"data.held_out: learning rates of {path.stem} are chosen by it; "
                "set it in the table"
            )
    return sweep


def _check_overrides(table: Table, overrides: Sequence[str]) -> None:
    """Raise UserError for an override of what the table sets itself, or of what tells a row from the others."""
    decided = table.list_decided()
    if table.vary:
        decided |= dict.fromkeys(table.vary.fields, "vary")
    overridden = [name for text in overrides for name in _list_fields(*parse_override(text))]
    for changed in overridden:
        for name, source in decided.items():
            if f"{changed}.".startswith(f"{name}."):  # the field, or a part of it
                raise UserError(
                    f"--set: {changed} follows from `{source}` of the table; change it in a table of "
                    "your own"
                )
    for text in overrides:
        changed, _ = parse_override(text)
        setting = table.find_row_setting(changed)
        if setting is not None:
            raise UserError(
                f"--set: {changed} overrules {setting}; set a field that no row has, or change it in "
                "a table of your own"
            )


def _check_seeds(recipe: Recipe, seed: int, overrides: Sequence[str]) -> None:
    """Raise UserError if a run has lost the seeds that the table gives it.

    Args:
        overrides: of the run, in order; a section that is set is replaced whole.
    """
    for section in ("train", "calibration"):
        is_kept = True
        for name, value in map(parse_override, overrides):
            if name == section:
                is_kept = f"{section}.seed" in _list_fields(name, value)
            is_kept = is_kept or name == f"{section}.seed"
        if not is_kept:
            raise UserError(
                f"{section}: a setting of the table or of --set replaces the whole section, with the "
                f"{section}.seed of each of `seeds`; set its fields one by one, as {section}.FIELD"
            )
    if recipe.train.seed != seed:
        raise UserError("train.seed: is one of the table's `seeds`; set those in the table")


def _list_fields(field: str, value: object) -> list[str]:
    """List the fields that an override sets: those inside of a section, or the field alone."""
    if not (isinstance(value, dict) and value):
        return [field]
    return [name for key in value for name in _list_fields(f"{field}.{key}", value[key])]


def _list_options(
    source: str, overrides: Sequence[str], output: Path | None, kept: Path | None
) -> tuple[str, ...]:
    """Return the options of launch/sweep.py and launch/report.py that lead to these arguments."""
    options = ["--table", source]
    for override in overrides:
        options += ["--set", override]
    if output is not None:
        options += ["--output", str(output)]
    if kept is not None:
        options += ["--keep", str(kept)]
    return tuple(options)


def _resolve_runs(sweep: Sweep, cell: Cell) -> list[Run]:
    """Resolve the cell's tuning runs, and a run of every seed at each other rate known in advance.

    The runs at the learning rate that tuning will choose only combine settings of these.

    Raises:
        UserError: what `read_recipe` finds wrong in a recipe; or a score chooses the step of a run
            for which it must not.
    """
    table = sweep.table
    runs = list(sweep.list_tuning_runs(cell).values())
    for run in runs:
        best = run.recipe.train.keep_best
        if best in run.recipe.task.dev_sets:
            raise UserError(
                f"train.keep_best: {best} would choose the step of a run that chooses a learning rate; "
                "set task.dev, train.keep_best and train.patience to null in learning_rates.set"
            )
    lrs = [None]  # with learning_rates, in the place of the row's own, which is not known yet
    if table.learning_rates and table.learning_rates.common is not None:
        lrs.append(table.learning_rates.common)
    for lr in lrs:
        for seed in table.seeds:
            runs.append(sweep.make_run(cell, lr, seed, table.suites))
    for run in runs:
        best = run.recipe.train.keep_best
        if best in list_benchmarks(table):
            raise UserError(
                f"train.keep_best: {best} is a score of the table, and too good after a step that "
                "it chose; choose another"
            )
    return runs


def _load_table(path: Path) -> dict:
    """Load the fields of a table and of those it extends. Raises UserError if it extends itself."""
    values: dict[str, Any] = {}
    for extended in load_extended(path, TABLES, "--table"):
        values = extended | values
    return values


def hash_recipe(recipe: Recipe) -> str:
    """Return ten hexadecimal digits that stand for everything in a resolved recipe."""
    return hashlib.sha256(dump_for_hash(recipe).encode()).hexdigest()[:10]


def has_diverged(folder: Path) -> bool:
    """Return whether a run ended because its loss was not finite. A new launch would repeat it."""
    state = read_state(folder)
    return state is not None and state["state"] == "diverged"


def has_ended(folder: Path) -> bool:
    """Return whether a run has finished or diverged: a new launch of it would change nothing."""
    return (folder / RESULTS).is_file() or has_diverged(folder)


def list_benchmarks(table: Table) -> list[str]:
    """List the benchmarks that the table's runs are scored on, with groups spelled out."""
    return expand_groups(table.suites)


def _to_overrides(settings: dict[str, Any]) -> list[str]:
    """Return settings as `field=value` of the command line. Values are JSON, which is also YAML."""
    return [f"{field}={json.dumps(value)}" for field, value in settings.items()]
