"""How many rows of each source a mix has, and which ones.

Weights are the proportions of a mix in which no row is used more often than `repeats` allows, and
which is as large as that permits: the scarcest source is used up, and of the others as much is taken
as the weights say. `datasets.interleave_datasets` ends there too (first_exhausted), but draws the
sources at random, so that its proportions hold on average only.
"""

import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from launch.config.rows import MixedRows
from launch.runtime.errors import UserError

MAX_ROWS = 100_000_000  # of an epoch: more is a mistake, and would fill memory and disk


class Share(NamedTuple):
    """What is taken of one source."""

    rows: int  # that an epoch trains on, repeated ones counted each time
    available: int  # rows that there are to train on: all but those held out
    held_out: int  # the source's last rows


def plan_shares(
    num_rows: Mapping[str, int], sources: Mapping[str, MixedRows], num_held_out: int
) -> dict[str, Share]:
    """Plan how many rows of each source are trained on, and how many are held out.

    Args:
        num_rows: name of a source -> good rows that it has.
        sources: all with a weight, or all with a count.
        num_held_out: rows to hold out, in the proportions of the mix.

    Raises:
        UserError: a source has too few rows for its count or for those held out, or is too small a
            part of the mix to have a row in it.
    """
    proportions = {name: _find_proportion(sources[name], num_rows[name]) for name in sources}
    held_out = apportion(num_held_out, proportions)
    available = {name: num_rows[name] - held_out[name] for name in sources}
    for name, left in available.items():
        if left < 1:
            raise UserError(
                f"data.held_out: {num_held_out} rows of the mix are {held_out[name]} of "
                f"data.sources.{name}, which has {num_rows[name]}: none is left to train on; lower it"
            )
    if any(rows.count is not None for rows in sources.values()):
        rows = {name: _check_count(name, sources[name], available[name]) for name in sources}
    else:
        rows = _fill_proportions(available, sources, proportions)
    if sum(rows.values()) > MAX_ROWS:
        raise UserError(
            f"data.sources: an epoch of the mix would have {sum(rows.values())} rows, above "
            f"{MAX_ROWS}; lower repeats"
        )
    return {name: Share(rows[name], available[name], held_out[name]) for name in sources}


def _find_proportion(rows: MixedRows, num_rows: int) -> Fraction:
    """Return a source's part of the mix: its weight, exactly as it is written, or its count."""
    if rows.weight is not None:
        return Fraction(repr(rows.weight))  # 0.1 is a tenth
    return Fraction(num_rows * rows.repeats if rows.count == "all" else rows.count)


def apportion(total: int, proportions: Mapping[str, Fraction]) -> dict[str, int]:
    """Divide `total` by `proportions`, by largest remainders; the names' order breaks ties."""
    whole = sum(proportions.values())
    exact = {name: total * part / whole for name, part in proportions.items()}
    shares = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (shares[name] - exact[name], name))
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def _check_count(name: str, rows: MixedRows, available: int) -> int:
    """Return the count of a source. Raises UserError if its rows cannot give it."""
    if rows.count == "all":
        return available * rows.repeats
    if rows.count > available * rows.repeats:
        needed = math.ceil(rows.count / available)
        times = "" if rows.repeats == 1 else f", {rows.repeats} times each"
        raise UserError(
            f"data.sources.{name}.count: {rows.count} is above the {available} rows of {rows.path} "
            f"that can be trained on{times}; lower it, or set data.sources.{name}.repeats={needed}"
        )
    return rows.count


def _fill_proportions(
    available: Mapping[str, int],
    sources: Mapping[str, MixedRows],
    proportions: Mapping[str, Fraction],
) -> dict[str, int]:
    """Return the rows of the largest mix with these proportions, each rounded to the nearest."""
    scales = _find_scales(available, sources, proportions)
    scarce = min(scales, key=scales.get)
    rows = {}
    for name, part in proportions.items():
        rows[name] = math.floor(scales[scarce] * part + Fraction(1, 2))
        if rows[name] == 0:
            raise UserError(
                f"data.sources.{name}.weight: {sources[name].weight:g} gives no row of it beside "
                f"{available[scarce] * sources[scarce].repeats} of {scarce}, which has weight "
                f"{sources[scarce].weight:g}; raise it, or data.sources.{scarce}.repeats"
            )
    return rows


def _find_scales(
    available: Mapping[str, int],
    sources: Mapping[str, MixedRows],
    proportions: Mapping[str, Fraction],
) -> dict[str, Fraction]:
    """Return how large a mix each source permits: its rows, repeated, over its proportion."""
    return {
        name: available[name] * sources[name].repeats / part for name, part in proportions.items()
    }


def find_scarce(shares: Mapping[str, Share], sources: Mapping[str, MixedRows]) -> list[str]:
    """Return the sources that keep a mix by weights from being larger.

    None where there are counts, or where all rows of all sources are used up.
    """
    if all(share.rows == share.available * sources[name].repeats for name, share in shares.items()):
        return []
    if any(rows.weight is None for rows in sources.values()):
        return []
    proportions = {name: _find_proportion(sources[name], 0) for name in shares}
    available = {name: share.available for name, share in shares.items()}
    scales = _find_scales(available, sources, proportions)
    return [name for name, scale in scales.items() if scale == min(scales.values())]


def choose_examples(name: str, num_available: int, num_rows: int) -> Tensor:
    """Choose examples of the first `num_available`, each as often as any other or once more.

    Args:
        name: of the source, which seeds the choice: parallel sources give different rows.

    Returns:
        (num_rows,), int64, ascending.
    """
    times, rest = divmod(num_rows, num_available)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    generator = torch.Generator().manual_seed(seed)
    others = torch.randperm(num_available, generator=generator)[:rest]
    return torch.cat([torch.arange(num_available).repeat(times), others]).sort().values


def list_distinct(shares: Mapping[str, Share]) -> list[int]:
    """List the places in a mix's training rows at which a row stands for the first time, ascending."""
    places, start = [], 0
    for name, share in shares.items():
        chosen = choose_examples(name, share.available, share.rows)
        is_new = torch.ones(len(chosen), dtype=torch.bool)
        is_new[1:] = chosen[1:] != chosen[:-1]
        places += (start + is_new.nonzero()[:, 0]).tolist()
        start += share.rows
    return places
