"""Prove that rows become the same batches in the same order whatever the world size.

Nothing is lost or counted twice. Needs nothing; a few seconds.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.data.batches import collate_examples
from launch.data.order import (
    count_steps,
    describe_idle_ranks,
    plan_steps,
    sample_examples,
    shard_batches,
)
from launch.data.token_set import TokenSet
from launch.quickstart.data import PROBLEMS, generate_documents, generate_problems
from launch.runtime.errors import UserError


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 6))
def test_dealing_gives_each_item_to_one_rank_and_each_rank_as_many_batches(
    items: int, world: int, size: int
) -> None:
    shares = [shard_batches(range(items), rank, world, size) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(batch) == size for share in shares for batch in share)
    dealt = [item for share in shares for batch in share for item in batch if item is not None]
    assert sorted(dealt) == list(range(items))
    whole = {tuple(batch) for share in shares for batch in share if batch[0] is not None}
    assert whole == {
        tuple(batch) for batch in shard_batches(range(items), 0, 1, size)
    }  # what a batch holds does not depend on it


@given(st.integers(1, 30), st.integers(1, 12), st.floats(0.1, 3), st.integers(0, 5))
def test_an_epoch_is_a_permutation_and_steps_are_full_but_the_last(
    rows: int, batch: int, epochs: float, seed: int
) -> None:
    steps = list(plan_steps(rows, batch, epochs, None, seed))
    order = [row for step in steps for row in step]
    assert len(steps) == count_steps(rows, batch, epochs, None)
    assert all(len(step) == batch for step in steps[:-1])
    for start in range(0, len(order) - rows + 1, rows):
        assert sorted(order[start : start + rows]) == list(range(rows))
    assert steps == list(plan_steps(rows, batch, epochs, None, seed))


def test_ranks_without_any_row_are_said() -> None:
    assert describe_idle_ranks([[0, 1], [2]], 2) is None
    assert describe_idle_ranks([[0, 1], [2]], 5) == (
        "3 of 5 ranks have nothing to train on: no step has more than 2 rows; start fewer ranks"
    )
    steps = list(plan_steps(3, 128, 1, None, 0))
    assert describe_idle_ranks(steps, 8).startswith("5 of 8 ranks")


def test_max_steps_overrides_epochs() -> None:
    assert [len(step) for step in plan_steps(5, 4, 1, 7, 0)] == [4] * 7
    assert count_steps(5, 4, 1, 7) == 7


def test_the_choice_of_calibration_rows_is_seeded_and_distinct() -> None:
    ids = sample_examples(100, 20, 3)
    assert len(set(ids)) == 20
    assert ids == sorted(ids) == sample_examples(100, 20, 3) != sample_examples(100, 20, 4)
    with pytest.raises(UserError, match=r"calibration\.samples: 6 is above the 5 examples"):
        sample_examples(5, 6, 0)


def test_padding_and_dummy_rows_count_for_nothing() -> None:
    # Two rows of 5 and 9 tokens, whose answers start at 3.
    tokens = TokenSet(
        torch.arange(1, 15, dtype=torch.int32), torch.tensor([0, 5, 14]), torch.tensor([3, 3]), 0, 0
    )
    batch, labels = collate_examples(tokens, [0, None, 1], torch.device("cpu"))
    lengths = tokens.lengths().tolist()
    assert batch["token_mask"].sum(1).tolist() == [lengths[0], 0, lengths[1]]
    assert (labels != -100).sum(1).tolist() == [
        tokens.count_answer_tokens([0]),
        0,
        tokens.count_answer_tokens([1]),
    ]
    assert torch.equal(labels[labels != -100], batch["input_ids"][labels != -100])
    assert not batch["token_mask"][0, lengths[0] :].any()


def test_the_quickstart_holds_its_pairs_out_and_its_base_never_sees_the_task() -> None:
    train, test = generate_problems()

    def pair(question: str) -> tuple[int, ...]:
        return tuple(
            sorted(
                int(word)
                for word in question.replace("?", "").replace(".", "").split()
                if word.isdigit()
            )
        )

    assert len({row["question"] for row in test}) == 200
    assert not {pair(row["question"]) for row in test} & {pair(row["query"]) for row in train}
    assert {"query", "response", "type", "original_question"} == train[0].keys()
    words = {"How many", "did they find", "The answer is"}
    texts = list(generate_documents(3000, 0))
    assert not [text for text in texts if any(word in text for word in words)]
    assert len(PROBLEMS) == 5
