"""A training on messages, in one process and sharded over two ranks: the same losses.

Two launches; 30 s, so in `make test-full` only.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.chat import MISTRAL
from tests.support.processes import make_set_options
from tests.support.runs import read_losses, read_results

pytestmark = [pytest.mark.full, pytest.mark.xdist_group("chat")]


def test_a_training_on_messages_does_not_depend_on_the_number_of_ranks(
    launch: Callable, recipe: Path, rows: list[dict], tmp_path: Path
) -> None:
    lines = []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        turns = []
        for row in (first, second):
            turns.append({"from": "human", "value": row["query"]})
            turns.append({"from": "gpt", "value": row["response"]})
        lines.append(json.dumps({"conversations": turns}) + "\n")
    (tmp_path / "chats.jsonl").write_text("".join(lines))
    (tmp_path / "chat.jinja").write_text(MISTRAL)  # of the special tokens that the base has
    settings = [
        f"data.path={tmp_path / 'chats.jsonl'}",
        f"data.chat_template={tmp_path / 'chat.jinja'}",
        "data.messages=conversations",
        "data.held_out=4",
        "train.max_steps=4",
        "eval.suites=[]",
    ]
    losses, hashes = {}, {}
    for ranks, engine in {1: "single", 2: "zero3"}.items():
        output = tmp_path / engine
        options = make_set_options([*settings, f"engine={engine}"])
        done = launch(
            "launch/train.py", "--recipe", recipe, *options, "--output", output, ranks=ranks
        )
        # Said at every start; the second run finds the tokens in the cache.
        assert "messages of 'conversations' have from and value" in done.stdout + done.stderr
        losses[engine] = read_losses(output)
        assert (output / "lora" / "chat_template.jinja").read_text() == MISTRAL
        hashes[engine] = read_results(output)["data"]["tokens_sha256"]
    assert len(losses["single"]) == 4
    # As for other rows: sums over ranks round differently.
    assert losses["zero3"] == pytest.approx(losses["single"], rel=1e-5)
    assert hashes["zero3"] == hashes["single"]
