"""Prove that held-out examples are split off whole and never trained or calibrated on.

Needs nothing; a second.
"""

import pytest
import torch

from launch.data.order import count_steps, plan_steps, sample_examples
from launch.data.token_set import TokenSet, count_shared, read_bytes, split_held_out
from launch.runtime.errors import UserError


def make_token_set(lengths: list[int]) -> TokenSet:
    """Make examples of which number i holds the token 10 + i; all but two tokens are the answer."""
    pieces = []
    for i, length in enumerate(lengths):
        pieces.append(torch.full((length,), 10 + i, dtype=torch.int32))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return TokenSet(torch.cat(pieces), offsets, torch.full((len(lengths),), 2), 3, 1)


def test_the_last_rows_are_split_off_whole() -> None:
    whole = make_token_set([3, 5, 4, 6])
    training, held_out = split_held_out(whole, 1)
    assert training.tokens.unique().tolist() == [10, 11, 12]
    assert held_out.tokens.tolist() == [13] * 6
    assert training.lengths().tolist() == [3, 5, 4]
    assert held_out.lengths().tolist() == [6]
    assert (training.num_truncated, training.num_dropped, held_out.num_truncated) == (3, 1, 0)
    # Whatever steps or calibration choose is an index into the training part.
    trained = set()
    for step in plan_steps(len(training), 2, 5, None, 0):
        trained.update(step)
    assert trained == {0, 1, 2}
    assert sample_examples(len(training), 3, 0) == [0, 1, 2]
    assert split_held_out(whole, 0) == (whole, None)
    with pytest.raises(UserError, match=r"data.held_out: 4 of 4 rows leave none"):
        split_held_out(whole, 4)


def test_rows_of_several_sets_that_are_trained_on_are_counted_in_one_pass() -> None:
    rows = make_token_set([3, 5, 4, 6])
    rows.tokens[-6:-2] = 12  # the last row begins as the third does, which is all of that one
    training, held_out = split_held_out(rows, 1)

    sets = [held_out, split_held_out(training, 2)[1], split_held_out(training, 1)[1]]
    sets = [read_bytes(part, range(len(part))) for part in sets]
    used = read_bytes(training, range(3))  # which is read once
    assert count_shared(sets, used) == [0, 2, 1]
    assert count_shared([[]], used) == [0]


@pytest.mark.parametrize(
    ("epochs", "rows", "steps"), [(1.1, 110, 11), (1.0, 100, 10), (0.015, 2, 1), (2.5, 250, 25)]
)
def test_a_part_of_an_epoch_has_its_rows_exactly(epochs: float, rows: int, steps: int) -> None:
    """1.1 times 100 is 110.00000000000001 in floating point."""
    planned = list(plan_steps(100, 10, epochs, None, 0))
    assert (sum(map(len, planned)), len(planned)) == (rows, steps)
    assert count_steps(100, 10, epochs, None) == steps
