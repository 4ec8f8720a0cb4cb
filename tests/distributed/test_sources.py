"""A training on a mix of rows and messages, killed and resumed, and on two ranks.

Proves that a killed run equals an undisturbed one bit for bit in the middle of a mix, that the losses
do not depend on the number of ranks, and that every place that reports a run says its sources. Three
launches; 40 s, so in `make test-full` only.
"""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.chat import MISTRAL
from tests.support.processes import ENGINES, Fault, Run, make_command, make_set_options
from tests.support.rows import write_lines
from tests.support.runs import (
    find_newest_step,
    read_losses,
    read_results,
    read_steps,
    runs_are_equal,
)

pytestmark = [pytest.mark.full, pytest.mark.xdist_group("sources")]


@pytest.fixture
def settings(rows: list[dict], tmp_path: Path) -> list[str]:
    """Write 40 rows in Alpaca's fields and 10 conversations; settings of a mix 3 : 1 of them."""
    alpaca, chats = [], []
    for number, row in enumerate(rows[:40]):
        hint = "" if number % 3 else "Think."
        alpaca.append({"instruction": row["query"], "input": hint, "output": row["response"]})
    for first, second in zip(rows[40::2], rows[41::2], strict=True):
        turns = []
        for row in (first, second):
            turns.append({"role": "user", "content": row["query"]})
            turns.append({"role": "assistant", "content": row["response"]})
        chats.append({"messages": turns})
    (tmp_path / "chat.jinja").write_text(MISTRAL)  # of the special tokens that the base has
    sources = {
        "alpaca": {
            "path": str(write_lines(tmp_path / "alpaca.jsonl", alpaca)),
            "instruction": "instruction",
            "input": "input",
            "answer": "output",
            "weight": 3,
        },
        "chats": {
            "path": str(write_lines(tmp_path / "chats.jsonl", chats)),
            "messages": "messages",
            "weight": 1,
            "repeats": 2,
        },
    }
    return [
        "data.path=null",
        f"data.sources={json.dumps(sources)}",
        f"data.chat_template={tmp_path / 'chat.jinja'}",
        "data.held_out=4",
        "adapter.dropout=0.1",
        "train.max_steps=12",
        "train.checkpoint_every=3",
        "eval.suites=[]",
    ]


def test_a_mix_resumes_in_its_middle_and_does_not_depend_on_the_number_of_ranks(
    launch: Callable,
    start_run: Callable[..., Run],
    recipe: Path,
    settings: list[str],
    tmp_path: Path,
) -> None:
    def make_line(name: str, *more: str) -> list[object]:
        options = make_set_options([*settings, *more])
        return ["--recipe", recipe, *options, "--output", tmp_path / name]

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run = start_run(
        make_command(*ENGINES["single"], *make_line("killed", "engine=single")), tmp_path / "log"
    )
    run.wait_for(lambda: len(read_steps(killed)) >= 7)
    assert run.send(Fault("all", signal.SIGKILL))
    run.wait()
    after = find_newest_step(killed)
    assert 0 < after < 12
    again = launch("launch/train.py", *make_line("killed", "engine=single"))
    assert f"resuming after step {after} of 12" in again.stdout
    done = launch("launch/train.py", *make_line("whole", "engine=single"))
    assert runs_are_equal(killed, whole)
    # 3 of 40 rows and 1 of 10 conversations are held out; a quarter of the mix are conversations.
    said = ["alpaca: 37 rows, 75.5% of an epoch", "chats: 12 rows, 24.5% of an epoch"]
    assert all(f"data.sources.{line}" in done.stdout for line in said)
    assert all(f"- data.sources.{line}" in (whole / "README.md").read_text() for line in said)
    data = read_results(whole)["data"]
    assert data["path"] == "a mix of alpaca, chats" and data["rows"] == 37 + 12 + 4
    taken = {name: (one["rows"], one["held_out"]) for name, one in data["sources"].items()}
    assert taken == {"alpaca": (37, 3), "chats": (12, 1)}
    assert read_results(whole)["held_out"]["after"]["tokens"] > 0
    page = tmp_path / "page.html"
    report = launch("launch/report.py", whole, "--html", page)
    assert all(f"whole, data.sources.{line}" in report.stdout for line in said)
    assert "37 rows, 75.5% of an epoch" in page.read_text()
    # Dropout's masks differ from rank to rank, so the ranks are compared without it.
    losses = {}
    for ranks, engine in {1: "single", 2: "zero3"}.items():
        line = make_line(engine, f"engine={engine}", "adapter.dropout=0", "train.max_steps=4")
        launch("launch/train.py", *line, ranks=ranks)
        losses[engine] = read_losses(tmp_path / engine)
        assert read_results(tmp_path / engine)["data"]["tokens_sha256"] == data["tokens_sha256"]
    assert losses["zero3"] == pytest.approx(losses["single"], rel=1e-5)
    other = launch(
        "launch/train.py",
        *make_line("killed", "engine=single", "data.sources.chats.weight=2"),
        check=False,
    )
    assert other.returncode == 2
    assert "data.sources.chats.weight (1.0, now 2.0)" in other.stderr + other.stdout
