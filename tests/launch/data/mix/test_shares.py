"""How many rows of each source a mix has: exact, in proportion, as many as there are; any sources.

Needs nothing; a second.
"""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.config.rows import MixedRows
from launch.data.mix.shares import (
    MAX_ROWS,
    Share,
    choose_examples,
    find_scarce,
    list_distinct,
    plan_shares,
)
from launch.runtime.errors import UserError
from tests.support.mixes import find_refused_fields

WEIGHTS = st.one_of(
    st.integers(1, 9).map(float), st.sampled_from([0.1, 0.2, 0.3, 0.7, 1 / 3, 1e-3, 2.5])
)


def make_rows(**fields: float) -> MixedRows:
    return MixedRows(path="f.jsonl", **fields)


@st.composite
def draw_sources(draw: st.DrawFn, field: str) -> tuple[dict[str, int], dict[str, MixedRows]]:
    """Draw the sizes of some sources, and what is asked of them."""
    amounts = WEIGHTS if field == "weight" else st.integers(1, 60)
    sizes, sources = {}, {}
    for name in draw(st.lists(st.sampled_from("abcde"), min_size=1, unique=True)):
        sizes[name] = draw(st.integers(1, 50))
        sources[name] = make_rows(**{field: draw(amounts), "repeats": draw(st.integers(1, 3))})
    return sizes, sources


@given(draw_sources("weight"), st.integers(0, 12))
def test_weights_are_the_proportions_of_the_largest_mix(
    drawn: tuple[dict[str, int], dict[str, MixedRows]], num_held_out: int
) -> None:
    sizes, sources = drawn
    refused = find_refused_fields(sizes, sources, num_held_out)
    try:
        shares = plan_shares(sizes, sources, num_held_out)
    except UserError as error:
        assert str(error).split(":")[0] in refused
        return
    assert not refused
    parts = {name: Fraction(str(rows.weight)) for name, rows in sources.items()}
    whole = sum(parts.values())
    assert sum(share.held_out for share in shares.values()) == num_held_out
    scales, capacities = [], {}
    for name, share in shares.items():
        assert abs(share.held_out - num_held_out * parts[name] / whole) < 1
        assert share.available == sizes[name] - share.held_out >= 1
        capacities[name] = share.available * sources[name].repeats
        assert 1 <= share.rows <= capacities[name]
        scales.append(capacities[name] / parts[name])
    # As large as the scarcest source allows, which is used up, and each share rounded to the nearest.
    for name, share in shares.items():
        assert abs(share.rows - min(scales) * parts[name]) <= Fraction(1, 2)
    used_up = {name for name, share in shares.items() if share.rows == capacities[name]}
    assert used_up
    scarce = find_scarce(shares, sources)
    assert bool(scarce) == (len(used_up) < len(shares))
    assert used_up.issuperset(scarce)
    for name in sources.keys() - set(scarce) if scarce else ():
        more = {name: sources[name].model_copy(update={"repeats": 100})}
        assert plan_shares(sizes, sources | more, num_held_out) == shares
    # The order in which a recipe names the sources changes nothing.
    names = sorted(sources, reverse=True)
    again = plan_shares(sizes, {name: sources[name] for name in names}, num_held_out)
    assert again == shares


@given(draw_sources("count"), st.integers(0, 12))
def test_counts_are_exact_or_refused(
    drawn: tuple[dict[str, int], dict[str, MixedRows]], num_held_out: int
) -> None:
    sizes, sources = drawn
    refused = find_refused_fields(sizes, sources, num_held_out)
    try:
        shares = plan_shares(sizes, sources, num_held_out)
    except UserError as error:
        assert str(error).split(":")[0] in refused
        return
    assert not refused
    assert {name: share.rows for name, share in shares.items()} == {
        name: rows.count for name, rows in sources.items()
    }
    assert sum(share.held_out for share in shares.values()) == num_held_out
    assert find_scarce(shares, sources) == []


@given(st.integers(1, 40), st.integers(1, 130), st.sampled_from(["a", "chats"]))
def test_every_example_is_chosen_as_often_as_any_other_or_once_more(
    num_available: int, num_rows: int, name: str
) -> None:
    chosen = choose_examples(name, num_available, num_rows).tolist()
    assert len(chosen) == num_rows
    assert chosen == sorted(chosen) == choose_examples(name, num_available, num_rows).tolist()
    counts = Counter(chosen)
    times = [counts[example] for example in range(num_available)]
    assert sum(times) == num_rows  # none from elsewhere
    assert max(times) - min(times) <= 1


def test_rows_are_drawn_from_everywhere_and_differ_between_sources() -> None:
    chosen = {name: set(choose_examples(name, 1000, 500).tolist()) for name in "abcd"}
    for rows in chosen.values():
        assert 200 < len(rows & set(range(500))) < 300
    assert len({frozenset(rows) for rows in chosen.values()}) == 4


@given(
    st.dictionaries(
        st.sampled_from("abc"), st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1
    )
)
def test_the_distinct_rows_are_each_listed_once(sizes: dict[str, tuple[int, int]]) -> None:
    shares = {name: Share(rows, available, 0) for name, (available, rows) in sizes.items()}
    mixed = []
    for name, share in shares.items():
        mixed += [(name, i) for i in choose_examples(name, share.available, share.rows).tolist()]
    listed = [mixed[place] for place in list_distinct(shares)]
    assert listed == sorted(set(mixed), key=mixed.index)


def test_the_source_that_binds_is_named_and_not_one_that_rounding_uses_up() -> None:
    sources = {"a": make_rows(weight=1), "b": make_rows(weight=10.01), "c": make_rows(weight=10)}
    shares = plan_shares({"a": 100, "b": 1000, "c": 5000}, sources, 0)
    assert [share.rows for share in shares.values()] == [100, 1000, 999]
    assert find_scarce(shares, sources) == ["b"]
    sources = {"a": make_rows(weight=1), "b": make_rows(weight=1), "c": make_rows(weight=1)}
    assert find_scarce(plan_shares({"a": 2, "b": 2, "c": 10}, sources, 0), sources) == ["a", "b"]


def test_a_mix_without_bounds_is_refused() -> None:
    many = {"weight": 1, "repeats": MAX_ROWS}
    sources = {"a": make_rows(**many), "b": make_rows(**many)}
    with pytest.raises(UserError, match=r"^data.sources: an epoch of the mix would have"):
        plan_shares({"a": 10, "b": 20}, sources, 0)


def test_all_rows_are_taken_beside_exact_counts() -> None:
    sources = {"a": make_rows(count="all"), "b": make_rows(count="all", repeats=3)}
    shares = plan_shares({"a": 30, "b": 10}, sources, 0)
    assert [share.rows for share in shares.values()] == [30, 30]
    # 6 rows are held out as 30 to 30, so 3 of each; the others are all trained on.
    shares = plan_shares({"a": 30, "b": 10}, sources, 6)
    assert [(share.rows, share.held_out) for share in shares.values()] == [(27, 3), (21, 3)]
    sources["a"] = make_rows(count=5)
    shares = plan_shares({"a": 30, "b": 10}, sources, 7)
    assert [(share.rows, share.held_out) for share in shares.values()] == [(5, 1), (12, 6)]


def test_weights_are_taken_as_they_are_written() -> None:
    # In binary 0.7 / 0.3 is below 7 / 3, and 0.1 above a tenth.
    sources = {"a": make_rows(weight=0.7), "b": make_rows(weight=0.3)}
    shares = plan_shares({"a": 7, "b": 3}, sources, 0)
    assert [share.rows for share in shares.values()] == [7, 3]
    assert find_scarce(shares, sources) == []


@pytest.mark.parametrize(
    ("sources", "held_out", "message"),
    [
        (
            {"a": {"count": 9}, "b": {"count": 2}},
            0,
            r"data.sources.a.count: 9 is above the 8 rows of f.jsonl that can be trained on; lower it, "
            "or set data.sources.a.repeats=2",
        ),
        (
            {"a": {"count": 30, "repeats": 2}, "b": {"count": 2}},
            0,
            "data.sources.a.count: 30 is above the 8 rows .* 2 times each; .*repeats=4",
        ),
        ({"a": {"count": 8}, "b": {"count": 2}}, 1, "data.sources.a.count: 8 is above the 7 rows"),
        (
            {"a": {"weight": 100}, "b": {"weight": 1}},
            0,
            "data.sources.b.weight: 1 gives no row of it beside 8 of a, which has weight 100",
        ),
        (
            {"a": {"weight": 1}, "b": {"weight": 1}},
            8,
            "data.held_out: 8 rows of the mix are 4 of data.sources.b, which has 4",
        ),
    ],
)
def test_what_cannot_be_met_is_refused(
    sources: dict[str, dict], held_out: int, message: str
) -> None:
    rows = {name: make_rows(**fields) for name, fields in sources.items()}
    with pytest.raises(UserError, match=message):
        plan_shares({"a": 8, "b": 4}, rows, held_out)
