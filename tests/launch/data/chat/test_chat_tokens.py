"""Messages in files of tokens, batches and the loss: what the mask says is what counts.

Needs nothing; a few seconds.
"""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from launch.config.schema import Data
from launch.data import token_cache
from launch.data.batches import IGNORED, collate_examples, collate_sequences
from launch.data.order import Packing
from launch.data.token_set import TokenSet, split_held_out
from launch.runtime.errors import UserError
from launch.training.loss import AnswerLoss
from tests.support.chat import CASES, make_chat_model, make_chat_tokenizer

CPU = torch.device("cpu")
ROWS = [
    {
        "chat": [
            {"role": "user", "content": f"what is {i} and {i}?"},
            {"role": "assistant", "content": "the " * (i % 5) + "answer"},
            {"role": "user", "content": "two?"},
            {"role": "assistant", "content": f"three {i}"},
        ]
    }
    for i in range(9)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_chat_tokenizer(CASES["chatml"]).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASTRA_CACHE", str(tmp_path / "cache"))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(path: Path, model: Path, **fields: object) -> token_cache.TokenFolder:
    return token_cache.obtain_tokens(Data(path=str(path), messages="chat", **fields), model)


def decode_trained(tokens: TokenSet, model: Path) -> list[str]:
    """Decode the tokens of each example that the loss counts."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = []
    for i in range(len(tokens)):
        places = tokens.offsets[i] + tokens.find_trained(i)
        texts.append(tokenizer.decode(tokens.tokens[places]))
    return texts


def expect(row: dict, end: str = "<|im_end|>") -> str:
    return "".join(m["content"] + end for m in row["chat"] if m["role"] == "assistant")


def test_files_hold_the_mask_and_are_resumed_and_found_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    made = make(path, model)
    tokens = made.open_tokens()
    assert decode_trained(tokens, model) == [expect(row) for row in ROWS]
    answer_tokens = tokens.count_answer_tokens(range(len(tokens)))
    assert made.manifest["answer_tokens"] == answer_tokens == int(tokens.is_trained.sum())
    last = make(path, model, train_on="last")
    assert decode_trained(last.open_tokens(), model) == [f"three {i}<|im_end|>" for i in range(9)]
    assert last.folder != made.folder
    # Killed between chunks of two rows, and resumed.
    monkeypatch.setattr("launch.data.rows.CHUNK", 2)
    write_json, folder = token_cache.write_json, tmp_path / "made"

    def die(where: Path, values: dict) -> None:
        write_json(where, values)
        if values.get("read") == 4:
            raise KeyboardInterrupt

    data = Data(path=str(path), messages="chat")
    monkeypatch.setattr(token_cache, "write_json", die)
    with pytest.raises(KeyboardInterrupt):
        token_cache.make_tokens(folder, data, model, path)
    with (folder / "trained.bin").open("ab") as file:
        file.write(b"\1\1\1")
    monkeypatch.setattr(token_cache, "write_json", write_json)
    resumed = token_cache.make_tokens(folder, data, model, path)
    assert resumed.manifest["tokens_sha256"] == made.manifest["tokens_sha256"]
    # Of a prepared folder the rows are not needed, but the same template is.
    prepared = Data(path=str(path), messages="chat", prepared=str(folder))
    assert token_cache.obtain_tokens(prepared, model).folder == folder
    other = tmp_path / "other.jinja"
    other.write_text(CASES["chatml"].template.replace("helpful", "blunt"))
    with pytest.raises(UserError, match="was made with another chat_template"):
        token_cache.obtain_tokens(
            Data(path=str(path), messages="chat", prepared=str(folder), chat_template=str(other)),
            model,
        )


def test_files_of_messages_of_an_earlier_reading_are_made_again_and_others_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(path=str(write(tmp_path / "rows.jsonl", ROWS)), messages="chat")
    prompts = data.model_copy(update={"messages": None})
    before = [token_cache.describe_origin(one, model, None) for one in (data, prompts)]
    made = token_cache.obtain_tokens(data, model)
    monkeypatch.setattr(token_cache, "MESSAGES_READING", token_cache.MESSAGES_READING + 1)
    after = [token_cache.describe_origin(one, model, None) for one in (data, prompts)]
    assert before[0] != after[0]
    assert before[1] == after[1]
    assert "messages_reading" not in after[1]
    assert token_cache.obtain_tokens(data, model).folder != made.folder


def test_cut_rows_keep_what_fits_and_rows_without_an_answer_are_bad(
    model: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS[:1])
    whole = make(path, model).open_tokens()
    starts = whole.find_trained(0)
    first, length = int(starts[0]), len(whole.tokens)
    cut = make(path, model, max_length=length - 3)
    assert cut.manifest["cut"] == 1
    assert cut.open_tokens().is_trained.equal(whole.is_trained[: length - 3])
    with pytest.raises(UserError, match=r"data\.max_length: no row has an answer token"):
        make(path, model, max_length=first)
    bad = write(tmp_path / "bad.jsonl", [*ROWS[:2], {"chat": []}, {"chat": ROWS[0]["chat"][:1]}])
    with pytest.raises(UserError, match=r"row 3 of .*: field 'chat' has no messages; in all 1 emp"):
        make(bad, model)
    kept = make(bad, model, on_bad_row="drop").manifest
    assert kept["dropped"] == {"empty": 1, "without an assistant's message": 1}


def test_what_follows_the_last_learnt_token_is_left_out_and_not_called_cut(
    model: Path, tmp_path: Path
) -> None:
    [row] = ROWS[:1]
    tokens = make(write(tmp_path / "rows.jsonl", [row]), model).open_tokens()
    assert tokens.is_trained[-1] == 1  # the template's line end after it is not there
    tail = {"chat": [*row["chat"], {"role": "user", "content": "more words " * 20}]}
    path = write(tmp_path / "tails.jsonl", [tail])
    fields = {"max_length": len(tokens.tokens), "on_cut": "refuse"}
    for train_on in ("all", "last"):
        found = make(path, model, train_on=train_on, **fields)
        assert found.manifest["cut"] == 0
        assert found.open_tokens().tokens.equal(tokens.tokens)
    with pytest.raises(UserError, match="answer cut at max_length"):
        make(path, model, **fields | {"max_length": len(tokens.tokens) - 1})


def test_the_loss_of_every_batch_is_that_of_the_masked_tokens(model: Path, tmp_path: Path) -> None:
    whole = make(write(tmp_path / "rows.jsonl", ROWS), model).open_tokens()
    training, held_out = split_held_out(whole, 3)
    assert decode_trained(training, model) == [expect(row) for row in ROWS[:6]]
    assert decode_trained(held_out, model) == [expect(row) for row in ROWS[6:]]
    network = make_chat_model().double()
    expected = 0.0
    for i in (6, 7, 8):  # one at a time, in plain PyTorch
        span = slice(*whole.offsets[i : i + 2].tolist())
        ids, mask = whole.tokens[span].long(), whole.is_trained[span].bool()
        logits = network(input_ids=ids[None]).logits[0, :-1]
        expected += cross_entropy(logits[mask[1:]], ids[1:][mask[1:]], reduction="sum").item()
    for packing in (None, Packing(400, flat=False)):
        sequences = [[2, 0], [1], None] if packing else [[2], [0], [1], None]
        batch = collate_sequences(held_out, sequences, packing)
        loss = AnswerLoss(network)(*batch.arguments())
        assert len(batch.targets) == held_out.count_answer_tokens([0, 1, 2])
        # AnswerLoss takes the cross-entropy in fp32.
        assert loss.item() == pytest.approx(expected, rel=1e-6)
    _, labels = collate_examples(held_out, [2, None, 0], CPU)
    counted = labels[labels != IGNORED]
    assert len(counted) == held_out.count_answer_tokens([0, 2])
    assert (labels[1] == IGNORED).all()


def test_a_system_prompt_beside_the_messages_is_said_not_to_be_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all rows, not of the first alone; `tools` is empty, and `id` no part of a conversation."""
    monkeypatch.setattr("launch.data.rows.CHUNK", 2)
    rows = [
        row | {"system": "Be kind." if i > 4 else " ", "tools": []} for i, row in enumerate(ROWS)
    ]
    path = write(tmp_path / "rows.jsonl", [row | {"id": 3} for row in rows])
    manifest = make(path, model).manifest
    assert manifest["unread"] == {"system": 4}
    assert manifest["notes"] == [
        f"data.messages: 4 of 9 rows of {path} have a field 'system', which is not read; put it into "
        "the list, as its first message",
        "data.messages: messages of 'chat' have role and content (OpenAI's names)",
    ]


def test_marks_that_leave_out_the_end_of_a_turn_are_noted(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "marks.jinja"
    content = "message['content']"
    marked = "{% generation %}{{ message['content'] }}{% endgeneration %}"
    template.write_text(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        f"{{% if message['role'] == 'assistant' %}}{marked}{{% else %}}{{{{ {content} }}}}{{% endif %}}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    path = write(tmp_path / "rows.jsonl", ROWS)
    notes = make(path, model, chat_template=str(template)).manifest["notes"]
    assert notes[1] == (
        "data.chat_template: its marks leave out <|im_end|>, so where to stop is not learnt"
    )
