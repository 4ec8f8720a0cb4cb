"""Rows with messages that are clumsy or hostile: read as they are meant, or refused by name."""

import json
from pathlib import Path

import pytest

from launch.config.loading import read_recipe, validate_section
from launch.config.schema import Data
from launch.data.chat.messages import OPENAI, SHAREGPT, MessagesError, read_messages
from launch.data.chat.template import ChatTemplate, load_template
from launch.data.chat.tokenize import tokenize_conversations
from launch.data.rows import BadRow, Conversation
from launch.runtime.errors import UserError
from tests.support.chat import CASES, CHATML, PHI3, QWEN3_CASE, TemplateCase, make_chat_tokenizer

DATA = Data(path="x", messages="chat")
USER = {"role": "user", "content": "one?"}
ANSWER = {"role": "assistant", "content": "three"}
MARKED = "message 2 of field 'chat' has"
CALL = {"type": "function", "id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}


def load(case: TemplateCase) -> ChatTemplate:
    return load_template(None, make_chat_tokenizer(case))


def find_fault(template: ChatTemplate, messages: object, train_on: str = "all") -> str | None:
    """Return what is wrong with a row, or None."""
    [(_, found)] = tokenize_conversations([Conversation(7, messages)], template, "chat", train_on)
    assert not isinstance(found, BadRow) or found.number == 7
    return found.what if isinstance(found, BadRow) else None


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        (None, "field 'chat' is None, not a list of messages"),
        ("[]", "field 'chat' is '[]', not a list of messages"),
        ([], "field 'chat' has no messages"),
        (["one"], "message 1 of field 'chat' is 'one', not an object"),
        ([{"text": "one"}], "message 1 of field 'chat' has text; it needs role and content"),
        (
            [USER, {"role": "bot", "content": "x"}],
            "message 2 of field 'chat' has role 'bot'; known",
        ),
        ([{"from": "judge", "value": "x"}], "message 1 of field 'chat' has role 'judge'; known"),
        ([USER], "field 'chat' has no assistant's message to learn"),
        ([USER, {"role": "assistant", "content": None}], "message 2 of field 'chat' is None, not"),
        (
            [USER, {"role": "assistant", "content": " \n"}],
            r"message 2 of field 'chat' is ' \n', em",
        ),
        ([{"role": "user"}, ANSWER], "message 1 of field 'chat' is None, not text"),
        ([USER, {"role": "assistant", "content": 3}], "message 2 of field 'chat' is 3, not text"),
        ([USER, {**ANSWER, "weight": 0}], f"{MARKED} weight 0, but is learnt"),
        ([USER, {**ANSWER, "weight": 0.5}], f"{MARKED} weight 0.5, but is learnt"),
        ([USER, {**ANSWER, "train": False}], f"{MARKED} train False, but is learnt"),
        ([USER, {**ANSWER, "training": 0}], f"{MARKED} training 0, but is learnt"),
        (
            [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y", "loss": False}],
            f"{MARKED} loss False, but is learnt",
        ),
        ([USER, {**ANSWER, "content": "\ud83d"}], "field 'chat' holds text that is not valid"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER],
            "message 1 of field 'chat' has a part of type image_url; only text",
        ),
        ([USER, {**ANSWER, "tool_calls": 5}], "message 2 of field 'chat' has tool calls 5, which"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}],
            "message 2 of field 'chat' has a tool call without the name",
        ),
        (
            [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}],
            "message 2 of field 'chat' has a tool call whose arguments are not JSON",
        ),
    ],
)
def test_a_row_that_cannot_be_learnt_from_is_named(messages: object, fault: str) -> None:
    with pytest.raises(MessagesError) as raised:
        read_messages(messages, "chat", "all")
    assert raised.value.what.startswith(fault)


def test_both_names_are_read_and_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    openai = [
        {"role": "system", "content": "be", "name": None},
        {"role": "user", "content": parts, "train": False},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {"role": "assistant", "content": "three", "weight": 1},
    ]
    messages, names = read_messages(openai, "chat", "all")
    assert names == OPENAI
    called = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 1}}}
    assert messages == [
        {"role": "system", "content": "be"},
        {"role": "user", "train": False, "content": "one\ntwo"},
        {"role": "assistant", "tool_calls": [called], "content": ""},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "assistant", "content": "three"},
    ]
    roles = ["system", "human", "gpt", "tool", "gpt"]
    sharegpt = [{"from": role, "value": role} for role in roles]
    messages, names = read_messages(sharegpt, "chat", "all")
    assert names == SHAREGPT
    known = ["system", "user", "assistant", "tool", "assistant"]
    assert [message["role"] for message in messages] == known
    assert [message["content"] for message in messages] == roles


@pytest.mark.parametrize("mark", [{"train": False}, {"loss": 0}, {"weight": 0}])
def test_a_mark_is_refused_on_a_message_that_is_learnt_alone(mark: dict) -> None:
    template = load(CASES["chatml"])
    shared = [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "three"}]
    for user, answer in ((USER, ANSWER), shared):
        first, last = [user, answer | mark, user, answer], [user, answer, user, answer | mark]
        fault = find_fault(template, first)
        assert fault.startswith(MARKED) and fault.endswith("; set data.train_on=last")
        assert find_fault(template, first, "last") is None
        for train_on in ("all", "last"):
            fault = find_fault(template, last, train_on)
            assert fault.startswith("message 4") and fault.endswith("but is learnt as any other")
        fault = find_fault(template, [*first[:2], *last[2:]])  # no way out of both
        assert fault.startswith(MARKED) and fault.endswith("but is learnt as any other")
    assert find_fault(template, [USER | mark, ANSWER]) is None  # no user's message is learnt


def test_what_the_template_refuses_or_leaves_out_is_said_in_its_words() -> None:
    gemma, chatml, qwen = (load(CASES[name]) for name in ("gemma", "chatml", "qwen2"))
    system = {"role": "system", "content": "be brief"}
    assert "(System role not supported)" in find_fault(gemma, [system, USER, ANSWER])
    assert "roles must alternate" in find_fault(gemma, [USER, USER, ANSWER])
    assert "roles must alternate" in find_fault(gemma, [USER, ANSWER, ANSWER])
    assert find_fault(chatml, [system, system, USER, ANSWER]) is None  # rendered as they are
    assert find_fault(chatml, [USER, USER, ANSWER, ANSWER]) is None
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    tool = {"role": "tool", "content": "3"}
    assert find_fault(qwen, [USER, call, tool, tool, ANSWER]) is None
    fault = find_fault(chatml, [USER, call, tool, ANSWER])
    assert fault == "the chat template leaves out the tool calls of message 2"
    developer = {"role": "developer", "content": "be brief"}
    fault = find_fault(qwen, [developer, USER, ANSWER])
    assert fault == "the chat template leaves out the content of message 1 (role developer)"


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_in_a_key_of_its_own_is_rendered_or_the_row_is_bad(key: str) -> None:
    thought = {**ANSWER, key: " hm \n"}
    shared = [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "three", key: "hm"}]
    silent = load(CASES["chatml"])
    fault = f"the chat template leaves out the {key} of message 2"
    assert find_fault(silent, [USER, thought]) == fault
    assert find_fault(silent, shared) == fault
    assert find_fault(silent, [USER, thought, USER, ANSWER]) == fault
    assert find_fault(silent, [USER, thought, USER, ANSWER], "last") is None  # not learnt
    rendered = f"message.get('{key}', '') + message['content']"
    shown = load(CASES["chatml"]._replace(template=CHATML.replace("message['content']", rendered)))
    assert find_fault(shown, [USER, thought]) is None
    assert find_fault(shown, shared) is None


def test_thinking_in_the_content_is_rendered_or_the_row_is_bad() -> None:
    shown = "message['content'].split('</think>')[-1]"  # as the templates of R1 have it
    silent = load(CASES["chatml"]._replace(template=CHATML.replace("message['content']", shown)))
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nthree"}
    fault = "the chat template leaves out the thinking in the content of message 2"
    assert find_fault(silent, [USER, thought]) == fault
    assert find_fault(silent, [USER, thought, USER, ANSWER]) == fault
    assert find_fault(silent, [USER, thought, USER, ANSWER], "last") is None  # not learnt
    empty = {"role": "assistant", "content": "<think>\n\n</think>\n\nthree"}
    assert find_fault(silent, [USER, empty]) is None
    before = {"role": "assistant", "content": "well <think>hm</think> three"}
    assert find_fault(load(QWEN3_CASE), [USER, before]) == fault  # which leaves out `well`
    for message in (thought, before):
        assert find_fault(load(CASES["chatml"]), [USER, message]) is None


def test_calls_beside_a_text_are_rendered_or_the_row_is_bad() -> None:
    chatml, qwen = load(CASES["chatml"]), load(CASES["qwen2"])
    called = {**ANSWER, "function_call": {"name": "add", "arguments": "{}"}}
    fault = "the chat template leaves out the function_call of message 2"
    assert find_fault(chatml, [USER, called]) == fault
    assert find_fault(chatml, [USER, called, USER, ANSWER], "last") == fault
    assert find_fault(chatml, [USER, {**ANSWER, "function_call": None}]) is None
    shared = [
        {"from": "human", "value": "one?"},
        {"from": "gpt", "value": "three", "tool_calls": [CALL]},
    ]
    fault = "the chat template leaves out the tool calls of message 2"
    assert find_fault(chatml, shared) == fault
    assert find_fault(qwen, shared) is None


def test_a_template_that_renders_earlier_turns_otherwise_is_refused_but_for_the_last() -> None:
    template = load(QWEN3_CASE)
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nthree"}
    assert find_fault(template, [USER, thought]) is None
    fault = find_fault(template, [USER, thought, USER, thought])
    assert fault.startswith("the chat template renders message 2 otherwise")
    assert find_fault(template, [USER, thought, USER, thought], "last") is None
    [(_, tokens)] = tokenize_conversations(
        [Conversation(1, [USER, thought, USER, thought])], template, "chat", "last"
    )
    start = tokens.is_trained.index(1)
    text = template.tokenizer.decode(tokens.ids[start : start + sum(tokens.is_trained)])
    assert text == "<think>\nhm\n</think>\n\nthree<|im_end|>"


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (
            CHATML.replace("{% if add_generation_prompt %}", "{% if false %}"),
            "does not take add_gen",
        ),
        (CHATML.replace("<|im_end|>", "\n"), "ends no answer by a special token"),
        (
            CHATML.replace("assistant\n' }}{% endif", "model\n' }}{% endif"),
            "renders an answer other",
        ),
        (CHATML + "{{ strftime_now('%d %b') }}", "writes today's date"),
        (CHATML + "{% if", "the chat template refuses it"),
        (PHI3.replace("message['content']", "message['text']"), "the chat template refuses it"),
    ],
)
def test_a_template_whose_turns_cannot_be_found_is_refused(template: str, fault: str) -> None:
    with pytest.raises(UserError, match=r"^data\.chat_template: ") as raised:
        load(CASES["chatml"]._replace(template=template))
    assert fault in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_named_file_is_taken_for_the_tokenizers_own_template(tmp_path: Path) -> None:
    tokenizer = make_chat_tokenizer(CASES["chatml"])
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML.replace("helpful", "blunt"))
    named = load_template(str(path), tokenizer)
    assert "blunt" in named.render([USER])
    path.write_text(CHATML.replace("helpful", "blunt"), encoding="utf-8-sig")
    marked = load_template(str(path), tokenizer)  # by a byte-order mark, which is no text
    assert marked.render([USER]) == named.render([USER])
    assert marked.text == named.text
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"data\.chat_template: the tokenizer has no chat template"):
        load_template(None, tokenizer)
    missing = str(tmp_path / "none")
    with pytest.raises(UserError, match=r"data\.chat_template: cannot read"):
        load_template(missing, tokenizer)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"messages": "chat", "answer": "output"}, "answer: messages have none"),
        ({"chat_template": "x.jinja"}, "chat_template: is for data.messages"),
        ({"train_on": "last"}, "train_on: is for data.messages"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: dict, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        validate_section(Data, {"path": "x"} | fields)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        (["eval.suites=[gsm8k]"], "^eval.prompt: recipe is Alpaca's prompt"),
        (
            ["eval.prompt=chat", "eval.chat_template=x"],
            "^eval.chat_template: is not data.chat_temp",
        ),
        (["eval.chat_template=x"], "^eval.chat_template: is for prompt chat"),
        (["calibration.statistics=reference"], "^calibration.statistics: the reference"),
    ],
)
def test_training_and_evaluation_take_the_same_prompt(fields: list[str], fault: str) -> None:
    settings = ["eval.suites=[]", "data.messages=chat", *fields]
    with pytest.raises(UserError, match=fault):
        read_recipe("metamath", settings)
    read_recipe("metamath", ["data.messages=chat", "eval.suites=[gsm8k]", "eval.prompt=chat"])


def test_a_default_recipe_stores_its_tokens_under_the_fields_that_it_had() -> None:
    assert not {"messages", "chat_template", "train_on"} & set(Data(path="x").token_fields())
    fields = json.dumps(DATA.token_fields())
    assert "train_on" in fields
    assert "chat_template" not in fields  # its text counts, not its path
