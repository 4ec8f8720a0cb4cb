"""Lists of messages as data sets have them, under the names that chat templates take.

OpenAI's rows name `role` and `content`, ShareGPT's `from` and `value`. The keys of each message say
which it is.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from launch.data.rows import EMPTY, NOT_TEXT, NOT_UNICODE, show_value

NOT_MESSAGES = "not a list of messages"
UNKNOWN_ROLE = "a role that is not known"
NO_ANSWER = "without an assistant's message"
UNSUPPORTED = "with what is not supported"
# ShareGPT's names of roles -> those of chat templates.
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}
ROLES = ("system", "developer", "user", "assistant", "tool")
# Keys of a message, beside its content, with what the assistant wrote.
THINKING = ("reasoning_content", "thinking", "reasoning")
CALLS = ("tool_calls", "function_call")
# Keys by which other programs take an assistant's message out of what is learnt.
LEARNING = ("train", "training", "loss")
OPENAI, SHAREGPT = "role and content (OpenAI's names)", "from and value (ShareGPT's names)"

Message = dict[str, Any]


class MessagesError(ValueError):
    """A row whose messages cannot be trained on."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason  # the kind of fault, by which bad rows are counted
        self.what = what  # what is wrong with this row, for people


def read_messages(
    value: object, field: str, train_on: Literal["all", "last"]
) -> tuple[list[Message], str]:
    """Read the value of a row's field as messages with `role` and a `content` of text.

    Parts of text are joined by line ends, and arguments of tool calls that are JSON in text are
    parsed, as servers of models do before they render them. Keys whose value is null are left out, and
    of ShareGPT's messages all but thinking and calls beside the text.

    Args:
        field: of the row.
        train_on: the answers that are learnt.

    Returns:
        The messages, and the names that they had, OPENAI or SHAREGPT.

    Raises:
        MessagesError: the value is no list of messages, or one of them cannot be trained on.
    """
    if not isinstance(value, list):
        _refuse(NOT_MESSAGES, f"field {field!r} is {show_value(value)}, {NOT_MESSAGES}")
    if not value:
        _refuse(EMPTY, f"field {field!r} has no messages")
    _require_plain_values(value, field)
    messages, names = [], OPENAI
    for number, given in enumerate(value, start=1):
        message, names = _read_message(given, f"message {number} of field {field!r}")
        messages.append(message)
    learnt = list_answers(messages, train_on)
    if not learnt:
        _refuse(NO_ANSWER, f"field {field!r} has no assistant's message to learn")
    _require_no_marks(value, learnt, field)
    return messages, names


def list_answers(messages: Sequence[Message], train_on: Literal["all", "last"]) -> list[int]:
    """List the numbers, from 0, of the assistant's messages: all, or the last."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return answers[-1:] if train_on == "last" else answers


def _refuse(reason: str, what: str) -> NoReturn:
    raise MessagesError(reason, what)


def _require_plain_values(value: list, field: str) -> None:
    """Raise MessagesError if there is something that JSON cannot spell, or invalid Unicode."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        _refuse(NOT_UNICODE, f"field {field!r} holds text that is {NOT_UNICODE}")
    except (TypeError, ValueError, RecursionError):
        _refuse(NOT_TEXT, f"field {field!r} holds values that are {NOT_TEXT}")


def _require_no_marks(value: list[dict], learnt: Sequence[int], field: str) -> None:
    """Raise MessagesError if a message that is learnt is marked not to be, or not in full.

    Args:
        value: the messages of a row, as they are given.
        learnt: their numbers, from 0.
    """
    marks = [_find_mark(value[number]) for number in learnt]
    for number, mark in zip(learnt, marks, strict=True):
        if mark is not None:
            hint = "" if marks[-1] else "; set data.train_on=last"  # which learns no other
            what = f"message {number + 1} of field {field!r} has {mark}, but is learnt as any other"
            _refuse(UNSUPPORTED, what + hint)


def _find_mark(given: dict) -> str | None:
    """Return what takes a message out of what is learnt, or out of it in part; None without."""
    if given.get("weight") not in (None, 1):
        return f"weight {given['weight']}"
    for key in LEARNING:
        if given.get(key) is not None and not given[key]:
            return f"{key} {given[key]}"
    return None


def _read_message(given: object, where: str) -> tuple[Message, str]:
    """Return one message under OpenAI's names, and the names that it had."""
    if not isinstance(given, dict):
        _refuse(NOT_MESSAGES, f"{where} is {show_value(given)}, not an object")
    given = {key: value for key, value in given.items() if value is not None}
    if "role" in given:
        names, known = OPENAI, {role: role for role in ROLES}
        role, content = given["role"], given.get("content")
        others = {key: value for key, value in given.items() if key not in ("role", "weight")}
    elif "from" in given:
        names, known = SHAREGPT, SHAREGPT_ROLES
        role, content = given["from"], given.get("value")
        others = {key: given[key] for key in (*THINKING, *CALLS) if key in given}
    else:
        has = ", ".join(given) or "no keys"
        _refuse(NOT_MESSAGES, f"{where} has {has}; it needs role and content, or from and value")
    if not isinstance(role, str) or role not in known:
        _refuse(UNKNOWN_ROLE, f"{where} has role {show_value(role)}; known: {', '.join(known)}")
    message = {"role": known[role], **others}
    if message.get("tool_calls"):
        if not isinstance(message["tool_calls"], list):
            shown = show_value(message["tool_calls"])
            _refuse(UNSUPPORTED, f"{where} has tool calls {shown}, which are no list")
        message["tool_calls"] = [_read_call(call, where) for call in message["tool_calls"]]
    message["content"] = _read_content(content, message, where)
    return message, names


def _read_content(content: object, message: Message, where: str) -> str:
    """Return the text of a message; that of an assistant's tool calls may be missing."""
    is_call = message["role"] == "assistant" and bool(message.get("tool_calls"))
    if content is None and is_call:
        return ""
    if isinstance(content, list):
        content = "\n".join(_read_part(part, where) for part in content)
    if not isinstance(content, str):
        _refuse(NOT_TEXT, f"{where} is {show_value(content)}, {NOT_TEXT}")
    if message["role"] in ("user", "assistant") and not content.strip() and not is_call:
        _refuse(EMPTY, f"{where} is {show_value(content)}, {EMPTY}")
    return content


def _read_part(part: object, where: str) -> str:
    """Return the text of one part of a content."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        shown = f"type {kind}" if isinstance(kind, str) else show_value(part)
        _refuse(UNSUPPORTED, f"{where} has a part of {shown}; only text is supported")
    return part["text"]


def _read_call(call: object, where: str) -> dict:
    """Return a tool call whose arguments are an object, as templates write it."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        _refuse(UNSUPPORTED, f"{where} has a tool call without the name of a function")
    if not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        _refuse(UNSUPPORTED, f"{where} has a tool call whose arguments are not JSON")
    function = function | {"arguments": arguments}
    return call | {"function": function} if "function" in call else function
