"""Held-out rows are never trained on, and measured losses are those of plain PyTorch.

Needs nothing but a tiny random model; a few seconds.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from launch.data.token_set import TokenSet
from launch.engines import make_engine
from launch.runtime.distributed import start_process_group, stop_process_group
from launch.runtime.errors import UserError
from launch.runtime.memory import gather_peak_memory
from launch.scoring import held_out
from launch.scoring.held_out import measure_prediction, read_other_text
from launch.training.trainable import count_trained_parameters


def make_token_set(lengths: list[int]) -> TokenSet:
    """Make examples of which number i holds the token 10 + i; all but two tokens are the answer."""
    pieces = []
    for i, length in enumerate(lengths):
        pieces.append(torch.full((length,), 10 + i, dtype=torch.int32))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return TokenSet(torch.cat(pieces), offsets, torch.full((len(lengths),), 2), 3, 1)


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The device of a started process group of one rank."""
    yield start_process_group()
    stop_process_group()


def test_prediction_is_the_mean_over_the_answer_tokens(
    device: torch.device, make_llama: Callable[..., LlamaForCausalLM]
) -> None:
    tokens = make_token_set([3, 5, 4, 6, 9, 3, 3, 7, 12])
    model = make_llama()
    found = measure_prediction(make_engine("single", device, torch.float32), model, tokens)
    losses, hits = [], []
    for i in range(len(tokens)):
        row = tokens.tokens[tokens.offsets[i] : tokens.offsets[i + 1]].long()
        logits = model.double()(input_ids=row[None]).logits[0, 1:-1]
        losses.append(F.cross_entropy(logits, row[2:], reduction="none"))
        hits.append(logits.argmax(-1) == row[2:])
    assert found.tokens == sum(map(len, losses)) == 34
    # The model runs in fp32 and the reference in fp64.
    assert found.loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert found.accuracy == torch.cat(hits).double().mean().item()


def test_memory_and_trained_parameters_are_counted(
    device: torch.device, make_llama: Callable[..., LlamaForCausalLM]
) -> None:
    assert gather_peak_memory(device)[0] > 2**20
    model = make_llama().requires_grad_(False)
    assert count_trained_parameters(model) == 0
    model.lm_head.requires_grad_(True)
    assert count_trained_parameters(model) == model.lm_head.weight.numel()


class LetterTokenizer:
    """A tokenizer of one token a letter."""

    eos_token_id = None

    def __call__(self, texts: list[str], **_: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[list(map(ord, text)) for text in texts])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "ab"}\n{"txt": 1}\n', "row 2 of .* has no field 'text'"),
        ("a.csv", "a", "neither .jsonl nor .txt"),
        ("a.txt", "", "has no text"),
        ("a.jsonl", "", "has no text"),
        ("a.jsonl", '{"text": 3}\n', "row 1 of .* has a field 'text' that is not text"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "row 1 .* that is not valid Unicode"),
        ("a.jsonl", '{"text": "a"}\n{"text"\n', "cannot read .*: line 2 of .* is not JSON"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "line 1 of .*'text' is there twice"),
    ],
)
def test_other_text_that_cannot_be_used_is_named(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_other_text(tmp_path / name, LetterTokenizer(), 8)
    with pytest.raises(UserError, match="cannot read"):
        read_other_text(tmp_path / "none.txt", LetterTokenizer(), 8)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "[a] *?.jsonl"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_other_text_arrives_to_the_letter(name: str, mark: bytes, tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\r\nfour\x0cfive\rsix </s> 2024-05-01"
    content = text if name.endswith(".txt") else json.dumps({"text": text}, ensure_ascii=False)
    end = b"" if name.endswith(".txt") else b"\r\n"
    (tmp_path / name).write_bytes(mark + content.encode() + end)
    tokens, _ = read_other_text(tmp_path / name, LetterTokenizer(), 1000)
    assert "".join(map(chr, tokens.tokens.tolist())) == text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_other_text_of_another_encoding_is_refused(
    name: str, encoding: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes('{"text": "é"}'.encode(encoding))
    with pytest.raises(UserError, match=r"^eval\.other_text: cannot read .*(UTF-8|utf-8)"):
        read_other_text(tmp_path / name, LetterTokenizer(), 1000)


def test_other_text_is_taken_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghi")
    tokens, source = read_other_text(tmp_path / "a.txt", LetterTokenizer(), 4)
    assert tokens.lengths().tolist() == [4, 4]  # the last letter alone has nothing before it
    assert tokens.count_answer_tokens([0, 1]) == 6
    assert len(source["sha256"]) == 64


def test_predictions_of_labels_are_measured_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    outputs, classes = torch.randn(7, 3).double(), torch.tensor([0, 2, 1, 1, 0, 2, 2])
    monkeypatch.setattr(held_out, "predict_rows", lambda *_: outputs)
    tokens = make_token_set([3] * 7)
    found = measure_prediction(None, None, replace(tokens, labels=classes))
    losses, num_right = [], 0
    for row, label in zip(outputs, classes, strict=True):
        losses.append(F.cross_entropy(row, label).item())
        num_right += int(row.argmax() == label)
    assert 0 < num_right < 7
    assert (found.accuracy, found.tokens) == (num_right / 7, 7)
    assert found.loss == pytest.approx(sum(losses) / 7)
    numbers = torch.randn(7).double()
    found = measure_prediction(None, None, replace(tokens, labels=numbers))
    assert found.loss == pytest.approx(F.mse_loss(outputs[:, 0], numbers).item())
    assert (found.accuracy, found.tokens) == (None, 7)
