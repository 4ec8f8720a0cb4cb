"""Find what of a mix of sources must be refused, by the rules of docs/data.md."""

import math
from collections.abc import Mapping
from fractions import Fraction

from launch.config.rows import MixedRows


def find_refused_fields(
    sizes: Mapping[str, int], sources: Mapping[str, MixedRows], num_held_out: int
) -> set[str]:
    """Return the fields that a refusal may name; none where the mix can be made.

    Args:
        sizes: name of a source -> its rows.
        sources: all with a weight, or all with a count that is a number.
        num_held_out: rows to hold out.
    """
    parts = {}
    for name, rows in sources.items():
        parts[name] = Fraction(str(rows.weight if rows.count is None else rows.count))
    held_out = _divide(num_held_out, parts)
    left = {name: sizes[name] - held_out[name] for name in sources}
    if min(left.values()) < 1:
        return {"data.held_out"}
    refused = set()
    # The mix is as large as each source permits; a source of less than half a row has none.
    scale = min(left[name] * sources[name].repeats / part for name, part in parts.items())
    for name, rows in sources.items():
        if rows.count is None:
            if scale * parts[name] < Fraction(1, 2):
                refused.add(f"data.sources.{name}.weight")
        elif rows.count > left[name] * rows.repeats:
            refused.add(f"data.sources.{name}.count")
    return refused


def _divide(total: int, parts: Mapping[str, Fraction]) -> dict[str, int]:
    """Divide `total` in proportion: the whole rows, then one each to those that lack the most."""
    exact = {name: total * part / sum(parts.values()) for name, part in parts.items()}
    given = {name: math.floor(share) for name, share in exact.items()}
    while sum(given.values()) < total:
        # The first of the names that lack the same.
        name = max(sorted(parts), key=lambda name: exact[name] - given[name])
        given[name] += 1
    return given
