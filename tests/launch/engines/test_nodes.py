"""Which layouts of ranks on nodes `shard_within: node` accepts, says or refuses.

What launchers would tell of the ranks is put in place of them. No processes.
"""

import pytest

from launch.config.loading import validate_recipe
from launch.engines import nodes
from launch.engines.nodes import choose_nodes, count_node_ranks
from launch.runtime.errors import UserError


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the lines that rank 0 prints; `find_nodes` is set by each test."""
    lines: list[str] = []
    monkeypatch.setattr(nodes, "print_rank0", lines.append)
    return lines


def test_equal_nodes_are_taken_in_any_order_by_fsdp(
    place: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cyclic = [[0, 2], [1, 3]]
    monkeypatch.setattr(nodes, "find_nodes", lambda: cyclic)
    assert choose_nodes("fsdp") == cyclic
    assert place == [
        "shard_within: node: each of 2 nodes holds the base, a shard on each of its 2 ranks"
    ]
    with pytest.raises(UserError, match=r"consecutive ranks on each node.*--distribution=block"):
        choose_nodes("zero3")
    monkeypatch.setattr(nodes, "find_nodes", lambda: [[0, 1], [2, 3]])
    assert choose_nodes("zero3") == [[0, 1], [2, 3]]


def test_one_node_is_said_and_needs_nothing(
    place: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "find_nodes", lambda: [[0, 1, 2]])
    assert choose_nodes("zero3") is None
    assert place == ["shard_within: node is the same as all here, as there is one node"]


@pytest.mark.parametrize(
    ("found", "line"),
    [
        ([[0, 1], [2]], "equally many ranks on every node, and these have 1 to 2"),
        ([[0], [1]], "one rank on each node would shard nothing"),
    ],
)
def test_other_nodes_are_refused(
    found: list[list[int]], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "find_nodes", lambda: found)
    with pytest.raises(UserError, match=f"shard_within: .*{line}"):
        choose_nodes("fsdp")


def test_engines_that_shard_no_base_are_refused() -> None:
    values = {"model": {"name": "m"}, "data": {"path": "d"}, "shard_within": "node"}
    assert validate_recipe(values | {"engine": "fsdp"}).shard_within == "node"
    for engine in ("zero2", "single", "zero3_offload"):
        with pytest.raises(UserError, match=f"shard_within: .*not {engine}"):
            validate_recipe(values | {"engine": engine})


def test_memory_is_estimated_for_what_a_node_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "find_nodes", lambda: [list(range(8)), list(range(8, 16))])
    assert count_node_ranks() == 8
    monkeypatch.setattr(nodes, "find_nodes", lambda: [list(range(8))])
    assert count_node_ranks() is None
