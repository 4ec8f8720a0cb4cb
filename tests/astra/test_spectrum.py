"""astra.spectrum: figures of known spectra, and ranks that keep the budget exactly.

Numbers only. A few seconds.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from astra.errors import AstraError
from astra.spectrum import allocate_ranks, compute_effective_rank, summarise_spectrum


def test_effective_rank_counts_equal_eigenvalues() -> None:
    assert compute_effective_rank(torch.tensor([0.0, 0.0, 3.0, 3.0, 3.0])) == pytest.approx(3)
    assert compute_effective_rank(torch.tensor([0.0, 5.0])) == pytest.approx(1)
    assert compute_effective_rank(torch.zeros(4)) == 0
    halves = torch.tensor([0.25, 0.75])
    assert compute_effective_rank(halves) == pytest.approx(
        4 / 3**0.75
    )  # exp of 0.25 log 4 + 0.75 log(4 / 3)


def test_figures_of_a_known_spectrum() -> None:
    spectrum = torch.tensor([0.0, 1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    found = summarise_spectrum(spectrum, spectrum[:3])
    assert (found["size"], found["rank"], found["trace"], found["zero_eigenvalues"]) == (
        5,
        3,
        16,
        1,
    )
    assert found["tail_energy_share"] == found["chosen_energy_share"] == 3 / 16
    assert found["gap_at_rank"] == 0.5
    assert summarise_spectrum(spectrum, spectrum[2:])["chosen_energy_share"] == 15 / 16
    assert summarise_spectrum(spectrum, spectrum)["gap_at_rank"] is None


@given(
    st.lists(st.tuples(st.floats(0, 4096), st.integers(1, 256)), min_size=1, max_size=40),
    st.integers(1, 128),
)
def test_ranks_keep_the_budget_the_bounds_and_the_order(
    modules: list[tuple[float, int]], rank: int
) -> None:
    effective = {f"m{i}": value for i, (value, _) in enumerate(modules)}
    most = {f"m{i}": size for i, (_, size) in enumerate(modules)}
    if sum(most.values()) < rank * len(modules):
        with pytest.raises(AstraError, match="is above what effective_rank may give"):
            allocate_ranks(effective, most, rank)
        return
    ranks = allocate_ranks(effective, most, rank)
    assert sum(ranks.values()) == rank * len(modules)
    assert all(1 <= ranks[name] <= most[name] for name in most)
    for a in ranks:
        for b in ranks:
            if effective[a] > effective[b] and most[a] >= most[b]:
                assert ranks[a] >= ranks[b] - 1  # rounding of remainders


def test_shares_are_those_of_log_effective_rank() -> None:
    found = allocate_ranks(
        {"a": math.expm1(1), "b": math.expm1(2), "c": math.expm1(3)}, dict.fromkeys("abc", 256), 40
    )
    assert found == {"a": 20, "b": 40, "c": 60}
