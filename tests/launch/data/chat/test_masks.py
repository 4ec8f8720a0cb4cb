"""Tokens of messages: those that transformers makes, and exactly the assistant's are learnt."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from launch.data.chat.template import ChatTemplate, load_template
from launch.data.chat.tokenize import ChatTokens, tokenize_conversations
from launch.data.rows import BadRow, Conversation
from tests.support.chat import CASES, CHATML, TemplateCase, make_chat_tokenizer

TOKENIZERS = {name: make_chat_tokenizer(case) for name, case in CASES.items()}
TEMPLATES = {name: load_template(None, tokenizer) for name, tokenizer in TOKENIZERS.items()}
PLAIN = ["the ", "one", "é", "\n", " ", "🙂", "[/INST]", "<", "|", "x"]
SPECIAL = ["<|im_end|>", "</s>", "<|eot_id|>", "<end_of_turn>", "<|im_start|>user\n"]


def contents(pieces: list[str]) -> st.SearchStrategy[str]:
    """Draw texts of some pieces that are not blank."""
    texts = st.lists(st.sampled_from(pieces), min_size=1, max_size=6).map("".join)
    return texts.filter(lambda text: bool(text.strip()))


@st.composite
def conversations(
    draw: st.DrawFn, case: TemplateCase, pieces: list[str] = PLAIN + SPECIAL
) -> list[dict]:
    """Draw messages that a template takes, with system and tool turns where it knows them."""
    texts = contents(pieces)
    messages = []
    if case.has_system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(texts)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(texts)})
        messages.append({"role": "assistant", "content": draw(texts)})
        if case.has_tool and draw(st.booleans()):
            messages.append({"role": "tool", "content": draw(texts)})
            messages.append({"role": "assistant", "content": draw(texts)})
    if draw(st.booleans()):
        messages.append({"role": "user", "content": draw(texts)})
    return messages


def tokenize(
    template: ChatTemplate, messages: object, train_on: str = "all"
) -> ChatTokens | BadRow:
    [(_, found)] = tokenize_conversations([Conversation(1, messages)], template, "chat", train_on)
    return found


def decode_runs(tokenizer: PreTrainedTokenizerFast, tokens: ChatTokens) -> list[str]:
    """Decode each run of tokens that are learnt."""
    runs = re.finditer("1+", "".join(map(str, tokens.is_trained)))
    return [tokenizer.decode(tokens.ids[run.start() : run.end()]) for run in runs]


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_answers_and_the_ends_of_their_turns_are_learnt_and_nothing_else(
    name: str, data: st.DataObject
) -> None:
    case, tokenizer = CASES[name], TOKENIZERS[name]
    messages = data.draw(conversations(case))
    tokens = tokenize(TEMPLATES[name], messages)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    expected = [(text.strip() if case.strips else text) + case.end for text in answers]
    assert decode_runs(tokenizer, tokens) == expected
    last = tokenize(TEMPLATES[name], messages, "last")
    assert decode_runs(tokenizer, last) == expected[-1:]
    assert last.ids == tokens.ids
    # transformers' own way to take what users write for text.
    reference = tokenizer.apply_chat_template(messages, sanitize_control_tokens=True)
    assert tokens.ids == reference["input_ids"]
    assert tokens.ids.count(tokenizer.bos_token_id) <= 1 or name in ("chatml", "qwen2")


@pytest.mark.parametrize("name", ["llama3", "chatml"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_marks_of_the_template_give_the_mask_of_transformers(
    name: str, data: st.DataObject
) -> None:
    case = CASES[name]
    if name == "chatml":
        marked = CHATML.replace(
            "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
            "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
            "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
            "{% else %}{{ message['content'] + '<|im_end|>' + '\n'}}{% endif %}",
        )
    else:
        marked = case.template.replace(
            "{{ content }}",
            "{% if message['role'] == 'assistant' %}{% generation %}{{ content }}{% endgeneration %}"
            "{% else %}{{ content }}{% endif %}",
        )
    assert marked != case.template
    tokenizer = make_chat_tokenizer(case._replace(template=marked))
    template = load_template(None, tokenizer)
    assert template.learns_end
    # Where a text spells a special token, transformers takes it for one here.
    messages = data.draw(conversations(case, PLAIN))
    tokens = tokenize(template, messages)
    reference = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
    assert tokens.ids == reference["input_ids"]
    assert tokens.is_trained == reference["assistant_masks"]
    assert len(decode_runs(tokenizer, tokenize(template, messages, "last"))) == 1


def test_marks_that_leave_out_the_end_of_a_turn_are_known() -> None:
    marked = CHATML.replace(
        "message['content'] + '<|im_end|>'",
        "'' }}{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>'",
    )
    assert marked != CHATML
    case = CASES["chatml"]._replace(template=marked)
    assert not load_template(None, make_chat_tokenizer(case)).learns_end
    assert load_template(None, make_chat_tokenizer(CASES["chatml"])).learns_end


@pytest.mark.parametrize("also", ["<|endoftext|>", "<unk>"])
def test_an_unknown_token_that_is_spelled_is_text_and_may_end_turns(also: str) -> None:
    end = "<|endoftext|>"
    case = CASES["chatml"]._replace(
        template=CHATML.replace("<|im_end|>", end),
        special=["<|im_start|>", end, "<|im_end|>", "<unk>"],
    )
    tokenizer = make_chat_tokenizer(case)
    tokenizer.unk_token = also  # the end of sequence, as GPT-2's and SmolLM2's is, or another
    template = load_template(None, tokenizer)
    assert template.end_of_turn == end
    messages = [
        {"role": "user", "content": f"is {also} text?"},
        {"role": "assistant", "content": f"the {also} is"},
    ]
    tokens = tokenize(template, messages)
    assert tokenizer.decode(tokens.ids) == template.render(messages)
    assert tokens.ids.count(tokenizer.eos_token_id) == 3  # of the system's turn and of these two
    assert tokenizer.convert_tokens_to_ids("<unk>") not in tokens.ids
    assert decode_runs(tokenizer, tokens) == [f"the {also} is{end}"]
