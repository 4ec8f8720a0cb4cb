"""Held-out rows are never trained or calibrated on, and losses are those of plain PyTorch, token by token."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from launch.data.tokenize import TokenSet, choose, step_rows
from launch.engines import make_engine
from launch.runtime.distributed import start, stop
from launch.runtime.errors import UserError
from launch.scoring import held_out as measure


def token_set(lengths: list[int]) -> TokenSet:
    """Row i holds the token 10 + i, of which all but two are the answer."""
    tokens = torch.cat(
        [torch.full((length,), 10 + i, dtype=torch.int32) for i, length in enumerate(lengths)]
    )
    return TokenSet(
        tokens, torch.tensor([0, *lengths]).cumsum(0), torch.full((len(lengths),), 2), 3, 1
    )


def test_the_last_rows_are_split_off_whole() -> None:
    whole = token_set([3, 5, 4, 6])
    training, held_out = measure.split(whole, 1)
    assert training.tokens.unique().tolist() == [10, 11, 12]
    assert held_out.tokens.tolist() == [13] * 6
    assert training.lengths().tolist() == [3, 5, 4]
    assert held_out.lengths().tolist() == [6]
    assert (training.num_cut, training.num_left_out, held_out.num_cut) == (3, 1, 0)
    # Whatever steps or calibration choose is an index into the training part.
    assert {row for step in step_rows(len(training), 2, 5, None, 0) for row in step} == {0, 1, 2}
    assert choose(len(training), 3, 0) == [0, 1, 2]
    assert measure.split(whole, 0) == (whole, None)
    with pytest.raises(UserError, match=r"data.held_out: 4 of 4 rows leave none"):
        measure.split(whole, 4)


def test_prediction_is_the_mean_over_the_answer_tokens(
    make_llama: Callable[..., LlamaForCausalLM],
) -> None:
    tokens = token_set([3, 5, 4, 6, 9, 3, 3, 7, 12])
    model = make_llama()
    device = start()
    try:
        found = measure.prediction(make_engine("single", device, torch.float32), model, tokens)
        assert measure.peak_memory(device)[0] > 2**20
    finally:
        stop()
    assert not dist.is_initialized()
    losses, hits = [], []
    for i in range(len(tokens)):
        row = tokens.tokens[tokens.offsets[i] : tokens.offsets[i + 1]].long()
        logits = model.double()(input_ids=row[None]).logits[0, 1:-1]
        losses.append(F.cross_entropy(logits, row[2:], reduction="none"))
        hits.append(logits.argmax(-1) == row[2:])
    assert found["tokens"] == sum(map(len, losses)) == 34
    assert found["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert found["accuracy"] == torch.cat(hits).double().mean().item()


class Letters:
    """A tokenizer of one token a letter."""

    eos_token_id = None

    def __call__(self, texts: list[str], **_: object):  # noqa: ANN204
        return type(
            "Encoding", (), {"input_ids": [[ord(letter) for letter in text] for text in texts]}
        )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "ab"}\n{"txt": 1}\n', "row 2 of .* has no field 'text'"),
        ("a.csv", "a", "neither .jsonl nor .txt"),
        ("a.txt", "", "has no text"),
    ],
)
def test_other_text_that_cannot_be_used_is_named(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        measure.read_text(tmp_path / name, Letters(), 8)
    with pytest.raises(UserError, match="cannot read"):
        measure.read_text(tmp_path / "none.txt", Letters(), 8)


def test_other_text_is_taken_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghi")
    tokens, source = measure.read_text(tmp_path / "a.txt", Letters(), 4)
    assert tokens.lengths().tolist() == [4, 4]  # the last letter alone has nothing before it
    assert tokens.answer_tokens([0, 1]) == 6
    assert len(source["sha256"]) == 64
