"""Rows become the same batches in the same order whatever the world size, and nothing is lost or counted twice."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launch.data import choose, collate, deal, num_steps, prompt, read_rows, step_rows, tokenise
from launch.errors import UserError
from launch.quickstart import PROBLEMS, documents, problems
from launch.recipe import Data


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character (a byte-level alphabet without merges), no beginning-of-sequence token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0} | {character: i for i, character in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 6))
def test_dealing_gives_each_item_to_one_rank_and_each_rank_as_many_batches(items: int, world: int, size: int) -> None:
    shares = [deal(range(items), rank, world, size) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(batch) == size for share in shares for batch in share)
    dealt = [item for share in shares for batch in share for item in batch if item is not None]
    assert sorted(dealt) == list(range(items))
    whole = {tuple(batch) for share in shares for batch in share if batch[0] is not None}
    assert whole == {
        tuple(batch) for batch in deal(range(items), 0, 1, size)
    }  # what a batch holds does not depend on it


@given(st.integers(1, 30), st.integers(1, 12), st.floats(0.1, 3), st.integers(0, 5))
def test_an_epoch_is_a_permutation_and_steps_are_full_but_the_last(
    rows: int, batch: int, epochs: float, seed: int
) -> None:
    steps = list(step_rows(rows, batch, epochs, None, seed))
    order = [row for step in steps for row in step]
    assert len(steps) == num_steps(rows, batch, epochs, None)
    assert all(len(step) == batch for step in steps[:-1])
    for start in range(0, len(order) - rows + 1, rows):
        assert sorted(order[start : start + rows]) == list(range(rows))
    assert steps == list(step_rows(rows, batch, epochs, None, seed))


def test_max_steps_overrides_epochs() -> None:
    assert [len(step) for step in step_rows(5, 4, 1, 7, 0)] == [4] * 7
    assert num_steps(5, 4, 1, 7) == 7


def test_the_choice_of_calibration_rows_is_seeded_and_distinct() -> None:
    ids = choose(100, 20, 3)
    assert len(set(ids)) == 20
    assert ids == sorted(ids) == choose(100, 20, 3) != choose(100, 20, 4)
    with pytest.raises(UserError, match=r"calibration\.samples: 6 is above the 5 training rows"):
        choose(5, 6, 0)


def test_tokens_are_prompt_answer_newline_eos_and_the_loss_counts_the_answer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokens = tokenise([("What?", "It is 7."), ("Why?", "So.")], tokenizer, 1000)
    for i, (question, answer) in enumerate([("What?", "It is 7."), ("Why?", "So.")]):
        ids = tokens.tokens[tokens.offsets[i] : tokens.offsets[i + 1]].tolist()
        start = int(tokens.answer_starts[i])
        assert tokenizer.decode(ids[:start]) == prompt(question)
        assert tokenizer.decode(ids[start:-1]) == answer + "\n"
        assert ids[-1] == tokenizer.eos_token_id
    assert tokens.answer_tokens([0, 1]) == len("It is 7.\n") + 1 + len("So.\n") + 1
    assert (tokens.num_cut, tokens.num_left_out) == (0, 0)


def test_rows_cut_by_max_length_are_counted_and_those_without_an_answer_left_out(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    room = len(prompt("Q")) + 3
    tokens = tokenise([("Q", "1"), ("Q", "12345"), ("Q" * 50, "1")], tokenizer, room)
    assert (len(tokens), tokens.num_cut, tokens.num_left_out) == (2, 2, 1)
    assert tokens.lengths().tolist() == [room, room]
    with pytest.raises(UserError, match=r"data\.max_length"):
        tokenise([("Q", "1")], tokenizer, 4)


def test_padding_and_dummy_rows_count_for_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenise([("a", "short"), ("b", "a longer answer")], tokenizer, 1000)
    batch, labels = collate(tokens, [0, None, 1], torch.device("cpu"))
    lengths = tokens.lengths().tolist()
    assert batch["counted"].sum(1).tolist() == [lengths[0], 0, lengths[1]]
    assert (labels != -100).sum(1).tolist() == [tokens.answer_tokens([0]), 0, tokens.answer_tokens([1])]
    assert torch.equal(labels[labels != -100], batch["input_ids"][labels != -100])
    assert not batch["counted"][0, lengths[0] :].any()


def test_rows_are_filtered_and_limited_in_file_order(tmp_path: Path) -> None:
    rows = [{"q": f"q{i}", "a": f"a{i}", "lang": "python" if i % 2 else "c"} for i in range(9)]
    path = write(tmp_path / "rows.jsonl", rows)
    data = Data(path=str(path), instruction="q", answer="a", keep={"lang": "python"}, limit=3)
    assert read_rows(data) == [("q1", "a1"), ("q3", "a3"), ("q5", "a5")]
    with pytest.raises(UserError, match=r"nothing to train on .* no row has \{'lang': 'rust'\}"):
        read_rows(data.model_copy(update={"keep": {"lang": "rust"}}))
    with pytest.raises(UserError, match=r"data\.keep: no field 'language'.* did you mean"):
        read_rows(data.model_copy(update={"keep": {"language": "rust"}}))


def test_json_parquet_and_folders_hold_the_same_rows(tmp_path: Path) -> None:
    import datasets

    rows = [{"query": f"q{i}", "response": f"a{i}"} for i in range(5)]
    wanted = [(row["query"], row["response"]) for row in rows]
    (tmp_path / "hub").mkdir()
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    write(tmp_path / "hub" / "train.jsonl", rows)
    for name in ("rows.json", "rows.parquet", "hub"):
        assert read_rows(Data(path=str(tmp_path / name))) == wanted, name


@pytest.mark.parametrize("value", [None, "", "   ", 7])
def test_a_row_whose_field_is_no_text_is_named(value: object, tmp_path: Path) -> None:
    rows = [{"query": "q", "response": "a"}] * 2 + [{"query": "q", "response": value}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows if isinstance(value, str | None) else [{"query": "q", "response": value}] * 3))
    row = 3 if isinstance(value, str | None) else 1
    with pytest.raises(UserError, match=rf"row {row} of .*: field 'response' is .*, not text"):
        read_rows(Data(path=str(path)))


def test_the_real_rows_are_read(shared: Path) -> None:
    rows = read_rows(Data(path=str(shared / "data" / "metamath_like_3000.jsonl"), limit=100))
    assert len(rows) == 100
    assert all("The answer is:" in answer for _, answer in rows)


def test_the_quickstart_holds_its_pairs_out_and_its_base_never_sees_the_task() -> None:
    train, test = problems()

    def pair(question: str) -> tuple[int, ...]:
        return tuple(sorted(int(word) for word in question.replace("?", "").replace(".", "").split() if word.isdigit()))

    assert len({row["question"] for row in test}) == 200
    assert not {pair(row["question"]) for row in test} & {pair(row["query"]) for row in train}
    assert {"query", "response", "type", "original_question"} == train[0].keys()
    words = {"How many", "did they find", "The answer is"}
    texts = [text for text, _ in zip(documents(), range(3000), strict=False)]
    assert not [text for text in texts if any(word in text for word in words)]
    assert len(PROBLEMS) == 5
