"""A chat template: messages to text, and which of its characters the assistant wrote.

Where the template marks the assistant's turns by {% generation %}, those marks are taken. Elsewhere a
turn is what the rendering of the messages up to it adds to that of the messages before it with the
generation prompt. Both must be beginnings of the whole rendering, or the row is refused: a
template may leave out earlier thinking, or move the system's message.
"""

import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from launch.data.chat.messages import THINKING, Message, MessagesError, list_answers
from launch.data.tokenize import find_special_tokens
from launch.runtime.errors import UserError

REFUSED = "refused by the chat template"
UNCLEAR = "whose turns the chat template does not keep apart"
LEFT_OUT = "of which the chat template leaves out a part"
DATE = "26 Jul 2024"  # Llama 3's own where it is given none: tokens must not change by the day
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THINKING = re.compile(r"</?think>")
_QUESTION, _ANSWER = "question0", "answer1"

Span = tuple[int, int]  # first character and the one after the last


@dataclass(frozen=True)
class ChatTemplate:
    """A template that has passed `load_template`, with the tokenizer it is for."""

    text: str
    tokenizer: PreTrainedTokenizerBase
    special: re.Pattern  # any special token, as it is spelled
    special_ids: frozenset[int]
    end_of_turn: str  # the special token after an assistant's message, as it is spelled
    learns_end: bool  # whether a turn that is learnt has that token: marks may leave it out

    @property
    def has_marks(self) -> bool:
        """Whether the template marks the assistant's turns itself."""
        return _GENERATION.search(self.text) is not None

    @property
    def end_token(self) -> int:
        """The id of the token that ends an assistant's turn."""
        return self.tokenizer.convert_tokens_to_ids(self.end_of_turn)

    def render(self, messages: list[Message], generate: bool = False) -> str:
        """Render `messages`; with the header of an answer to come if `generate`.

        Raises MessagesError with the template's own words if it refuses them.
        """
        return _render(self.text, self.tokenizer, messages, generate)[0]

    def find_turns(
        self, messages: list[Message], train_on: Literal["all", "last"]
    ) -> tuple[str, list[Span]]:
        """Render `messages`, and find the assistant's turns, up to the token that ends each.

        Marks of the template are taken as they are; `learns_end` says whether they have that token.

        Args:
            train_on: all turns of the assistant, or the last.

        Returns:
            The whole text, and the characters of each turn.

        Raises:
            MessagesError: the template refuses the messages, leaves one out or does not keep turns
                apart.
        """
        wanted = list_answers(messages, train_on)
        if self.has_marks:
            text, spans = _render(self.text, self.tokenizer, messages, generate=False)
            num_answers = len(list_answers(messages, "all"))
            if len(spans) != num_answers:
                what = f"the chat template marks {len(spans)} turns of {num_answers} answers"
                raise MessagesError(UNCLEAR, what)
            spans = spans[-len(wanted) :]
        else:
            text = self.render(messages)
            spans = [self._find_turn(messages, i, text) for i in wanted]
        _require_all_messages(messages, wanted, text)
        return text, spans

    def _find_turn(self, messages: list[Message], number: int, text: str) -> Span:
        """Find the turn of message `number`, from 0, in the rendering `text` of all messages."""
        before = self.render(messages[:number], generate=True)
        after = text if number == len(messages) - 1 else self.render(messages[: number + 1])
        end = self._find_end(after, len(before))
        if not text.startswith(before) or end is None or text[:end] != after[:end]:
            raise MessagesError(
                UNCLEAR,
                f"the chat template renders message {number + 1} otherwise where others follow it, "
                "so what the assistant wrote is not certain; set data.train_on=last, or "
                "data.chat_template to one with {% generation %}",
            )
        return len(before), end

    def _find_end(self, text: str, start: int) -> int | None:
        """Return where the turn that begins at `start` ends, behind its token; None without one."""
        place = text.rfind(self.end_of_turn, start)
        if place >= 0:
            return place + len(self.end_of_turn)
        # A turn that calls tools may end in another token.
        ends = [match.end() for match in self.special.finditer(text, start)]
        return ends[-1] if ends and not text[ends[-1] :].strip() else None


def load_template(
    path: str | None, tokenizer: PreTrainedTokenizerBase, field: str = "data.chat_template"
) -> ChatTemplate:
    """Load the template at `path`, or the tokenizer's own when None, and check it on two messages.

    Args:
        field: of the recipe, which names `path`.

    Raises:
        UserError: there is none, or turns and their ends cannot be found in what it renders.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{field}: chat templates need a fast tokenizer; the model has none")
    text = read_template(path, tokenizer, field)
    if "strftime_now" in text and "date_string" not in text:
        raise UserError(
            f"{field}: the chat template writes today's date, so tokens would change by the day; "
            "give a copy with a fixed date"
        )
    ids = find_special_tokens(tokenizer).ids
    # The unknown token too, which may also be the end of sequence (GPT-2). It is spelled alone: other
    # tokenizers make its id of ordinary text.
    names = {tokenizer.convert_ids_to_tokens(i) for i in ids} | ({tokenizer.unk_token} - {None})
    spelled = sorted(names, key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, spelled)) or "(?!)")
    question = {"role": "user", "content": _QUESTION}
    answer = {"role": "assistant", "content": _ANSWER}
    try:
        bare, _ = _render(text, tokenizer, [question], generate=False)
        before, _ = _render(text, tokenizer, [question], generate=True)
        whole, spans = _render(text, tokenizer, [question, answer], generate=False)
    except MessagesError as error:
        raise UserError(f"{field}: {error.what}, of a question and an answer") from None
    lead, found, tail = whole[len(before) :].partition(_ANSWER)
    if not whole.startswith(before) or not found:
        raise UserError(
            f"{field}: the chat template renders an answer otherwise than the generation prompt "
            "begins; give one that fits"
        )
    if lead.strip() and before == bare:
        raise UserError(
            f"{field}: the chat template does not take add_generation_prompt, so an answer's header "
            "is not told from the answer; give one that does"
        )
    end = special.match(tail.lstrip())
    if end is None:
        raise UserError(
            f"{field}: the chat template ends no answer by a special token, so where to stop could "
            "not be learnt; give one that does"
        )
    learns_end = all(end.group() in whole[slice(*span)] for span in spans)
    return ChatTemplate(text, tokenizer, special, ids, end.group(), learns_end)


def read_template(
    path: str | None, tokenizer: PreTrainedTokenizerBase, field: str = "data.chat_template"
) -> str:
    """Read the text of the template at `path`, without a byte-order mark, or of the tokenizer's own.

    Raises UserError.
    """
    if path is not None:
        try:
            return Path(path).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{field}: cannot read {path}: {error}") from None
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            f"{field}: the tokenizer has no chat template of its own; name a file"
        ) from None


def hash_template(text: str) -> str:
    """Return the SHA-256 of a template's text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _render(
    template: str, tokenizer: PreTrainedTokenizerBase, messages: list[Message], generate: bool
) -> tuple[str, list[Span]]:
    """Render messages; return the text and the characters that {% generation %} marks."""
    try:
        texts, spans = render_jinja_template(
            [messages],
            chat_template=template,
            return_assistant_tokens_mask=_GENERATION.search(template) is not None,
            add_generation_prompt=generate,
            date_string=DATE,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        words = " ".join(str(error).split())[:200]
        raise MessagesError(REFUSED, f"the chat template refuses it ({words})") from None
    return texts[0], spans[0] if spans else []


def _require_all_messages(messages: list[Message], learnt: Collection[int], text: str) -> None:
    """Raise MessagesError if a part of the messages is not in `text`, as it is or as JSON.

    Looked for are the contents, the names of called functions, and, of messages that are learnt,
    thinking, within the content or in a key of its own. A template may leave out other thinking, of
    earlier turns.

    Args:
        learnt: the numbers, from 0, of the messages that are learnt.
    """
    for number, message in enumerate(messages):
        content = message["content"]
        what = None
        if message["role"] == "assistant":
            thinking, _, content = content.rpartition("</think>")
            parts = _THINKING.split(thinking) if number in learnt else ()
            if not all(_has_text(text, part) for part in parts):
                what = f"the thinking in the content of message {number + 1}"
        if not _has_text(text, content):
            what = f"the content of message {number + 1} (role {message['role']})"
        for key in THINKING if number in learnt else ():
            if isinstance(message.get(key), str) and not _has_text(text, message[key]):
                what = f"the {key} of message {number + 1}"
        for call in message.get("tool_calls") or ():
            if call.get("function", call)["name"] not in text:
                what = f"the tool calls of message {number + 1}"
        call = message.get("function_call")
        name = call.get("name") if isinstance(call, dict) else call
        if name is not None and str(name) not in text:
            what = f"the function_call of message {number + 1}"
        if what is not None:
            raise MessagesError(LEFT_OUT, f"the chat template leaves out {what}")


def _has_text(text: str, part: str) -> bool:
    """Return whether `text` has `part` without white space around it, as it is or as JSON."""
    part = part.strip()
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text
