"""data.sources in a recipe: what is refused, by name and in one line, and what is stored.

Needs nothing; a second.
"""

from pathlib import Path

import pytest

from launch.config.loading import (
    dump_for_hash,
    dump_recipe,
    find_difference,
    read_recipe,
    read_stored_recipe,
)
from launch.config.schema import Recipe
from launch.planning.options import PlanOptions
from launch.planning.printout import count_planned_steps
from launch.runtime.errors import UserError

MIX = """
model: {name: base}
data:
  sources:
    code: {path: code.jsonl, weight: 2}
    chat: {path: chat.jsonl, messages: messages, weight: 1e-1, limit: 9}
"""
COUNTS = [
    "data.sources.code={path: code.jsonl, count: 100}",
    "data.sources.chat={path: chat.jsonl, messages: m, count: 20, repeats: 2}",
]


@pytest.fixture
def mix(tmp_path: Path) -> str:
    """Return the path of a recipe of a mix."""
    path = tmp_path / "mix.yaml"
    path.write_text(MIX)
    return str(path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.sources.code.weight=null", "data.sources.code.weight: is required"),
        ("data.sources.code.count=3", "data.sources.code.count: there is a weight too"),
        ("data.sources.code.wieght=3", "data.sources.code.wieght: unknown key; did you mean data"),
        ("data.sources.code.weight=0", "data.sources.code.weight: 0 is not valid"),
        ("data.sources.code.weight=.nan", "data.sources.code.weight: nan is not valid"),
        ("data.sources.code.weight=true", "data.sources.code.weight: True is not valid"),
        (
            "data.sources.code.count=0",
            "data.sources.code.count: 0 is not valid: Input should be a w",
        ),
        ("data.sources.code.count=1.5", "data.sources.code.count: 1.5 is not valid"),
        ("data.sources.code.count=some", "data.sources.code.count: 'some' is not valid"),
        ("data.sources.code.repeats=0", "data.sources.code.repeats: 0 is not valid"),
        ("data.sources.code={weight: 1}", "data.sources.code.path: is required"),
        ("data.sources.code={path: code.jsonl, count: 3}", "data.sources: chat has a weight and"),
        ("data.sources.code=code.jsonl", "data.sources.code: 'code.jsonl' is not valid"),
        ("data.sources=[{path: f, weight: 1}]", "data.sources: each needs a name; write {name:"),
        ("data.sources={a.b: {path: f, weight: 1}}", "data.sources: 'a.b' is no name"),
        ("data.sources={1: {path: f, weight: 1}}", "data.sources: 1 is no name"),
        ("data.sources.chat.text=t", "data.sources.chat.text: rows have messages or plain text"),
        ("data.sources.chat.answer=a", "data.sources.chat.answer: messages have none"),
        ("data.sources.twin={path: code.jsonl, weight: 1}", "data.sources: twin reads the same"),
        ("data.path=rows.jsonl", "data.sources: data.path is set too"),
        ("data.limit=5", "data.limit: with data.sources each source has its own; set data.sources"),
        ("data.messages=m", "data.messages: with data.sources each source has its own"),
        ("data.sources=null", "data.path: is required"),
        ("data.sources={}", "data.path: is required"),
        ("calibration.statistics=reference", "calibration.statistics: .* not of data.sources"),
        (
            "task={kind: regression, sentence1: s}",
            "data.sources: is for causal tasks only, not for regression",
        ),
    ],
)
def test_what_means_nothing_is_refused(mix: str, setting: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as caught:
        read_recipe(mix, [setting])
    assert "\n" not in str(caught.value)


def test_templates_and_prompts_are_checked_where_some_rows_are_messages(mix: str) -> None:
    suites = "eval.suites=[gsm8k]"
    assert read_recipe(mix, [suites]).data.has_messages  # the other rows have Alpaca's prompt
    assert not read_recipe(mix, []).data.is_chat
    text = "data.sources.code={path: text.txt, text: text, weight: 1}"
    assert read_recipe(mix, [text]).data.is_chat
    with pytest.raises(UserError, match=r"^eval.prompt: recipe is Alpaca's prompt"):
        read_recipe(mix, [text, suites])
    with pytest.raises(UserError, match=r"^eval.chat_template: is not data.chat_template"):
        read_recipe(mix, ["eval.prompt=chat", "data.chat_template=file.jinja"])
    template = ["data.chat_template=file.jinja", "data.train_on=last"]
    sources = read_recipe(mix, template).data.list_sources()
    assert sources["chat"].chat_template == "file.jinja" and sources["chat"].train_on == "last"
    assert sources["code"].chat_template is None and sources["code"].train_on == "all"
    plain = "data.sources.chat={path: chat.jsonl, weight: 1}"
    with pytest.raises(UserError, match=r"^data.train_on: is for the messages of one of data.sou"):
        read_recipe(mix, [plain, "data.train_on=last"])


def test_a_stored_mix_is_the_same_and_a_change_is_named(mix: str, tmp_path: Path) -> None:
    recipe = read_recipe(mix, [])
    stored = tmp_path / "recipe.yaml"
    stored.write_text(dump_recipe(recipe))
    assert read_stored_recipe(stored) == recipe
    changed = read_recipe(mix, ["data.sources.code.weight=3"])
    expected = "data.sources.code.weight (2.0, now 3.0)"
    assert find_difference(recipe, changed) == expected
    assert dump_for_hash(recipe) != dump_for_hash(changed)
    others = read_recipe(mix, ["data.sources.more={path: more.jsonl, weight: 1}"])
    assert find_difference(recipe, others) == "data.sources.more.path (null, now more.jsonl)"
    assert find_difference(others, recipe) == "data.sources.more.path (more.jsonl, now null)"
    assert "sources" not in dump_for_hash(read_recipe("metamath", []))


def test_the_rows_of_counts_are_planned_and_those_of_weights_are_asked_for(mix: str) -> None:
    def count(recipe: Recipe, num_rows: int | None = None) -> int:
        return count_planned_steps(recipe, PlanOptions(machine=None, num_rows=num_rows))

    counted = read_recipe(mix, [*COUNTS, "train.global_batch=10"])
    assert count(counted) == 12
    assert count(read_recipe(mix, [*COUNTS, "train.global_batch=10", "data.held_out=9"])) == 12
    weighted = read_recipe(mix, ["train.global_batch=10"])
    assert count(weighted, 100) == 10
    with pytest.raises(UserError, match=r"^--rows: .* counts of data.sources"):
        count(weighted)
    everything = read_recipe(mix, [*COUNTS, "data.sources.chat.count=all"])
    with pytest.raises(UserError, match=r"^--rows: "):
        count(everything)
