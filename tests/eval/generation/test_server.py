"""Responses from a completions server, a real one that fails now and then, as under load.

Needs a free port. A few seconds.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from eval.errors import EvalError
from eval.generation.decoding import Completion
from eval.generation.server import request_completions


class Handler(BaseHTTPRequestHandler):
    """Answers prompt p with "p!p", after two failures; refuses the model "absent"."""

    protocol_version = "HTTP/1.1"
    seen: list[dict]
    busy: list[int]  # now, and at most
    lock: threading.Lock
    refusal: str  # of a prompt that is too long, with its new tokens or alone
    above: str | None = None  # of new tokens beyond the context, if it has other words for them
    context: int = 10  # tokens of the model "short"; a letter is a token
    may_fill: bool = True  # whether a prompt and its new tokens may be as long as the context
    reserved: int = 0  # tokens that count with a prompt's
    has_usage: bool = True

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.seen.append(body | {"key": self.headers.get("Authorization"), "path": self.path})
            attempt = Counter(of["prompt"] for of in self.seen)[body["prompt"]]
            self.busy[0] += 1
            self.busy[1] = max(self.busy)
        if body["model"] == "absent":
            self.answer(404, {"error": "no such model"})
        elif attempt <= 2 and body["model"] == "flaky":
            self.answer(503, {"error": "later"})
        elif body["model"] == "short":
            self.answer_short(body)
        elif body["model"] == "alone":
            self.answer_alone(body)
        elif body["model"] == "odd":
            self.answer(200, {"choices": []})
        else:
            self.answer(200, {"choices": [{"text": f"{body['prompt']}!{body['prompt']}"}]})
        with self.lock:
            self.busy[0] -= 1

    def answer_short(self, body: dict) -> None:
        """Refuse a prompt that does not fit with all its new tokens, as vLLM and SGLang do."""
        size, new = len(body["prompt"]) + self.reserved, body["max_tokens"]
        if size + new < self.context or (self.may_fill and size + new == self.context):
            self.answer(200, self.complete(body, new))
            return
        left = self.context - new
        counted = min(size, left + 1)  # vLLM reads no more of a prompt
        words = self.above if self.above and left < 0 else self.refusal
        self.refuse(
            words.format(
                context=self.context,
                size=size,
                new=new,
                sum=size + new,
                left=left,
                counted=counted,
                counted_sum=counted + new,
            )
        )

    def answer_alone(self, body: dict) -> None:
        """Refuse a prompt that leaves no room, and end a response where the context ends."""
        room = self.context - len(body["prompt"])
        if room > 0:
            self.answer(200, self.complete(body, min(room, body["max_tokens"])))
        else:
            self.refuse(self.refusal.format(size=len(body["prompt"]), context=self.context))

    def complete(self, body: dict, new: int) -> dict:
        completion: dict = {"choices": [{"text": "x" * new, "finish_reason": "length"}]}
        if self.has_usage:
            completion["usage"] = {"prompt_tokens": len(body["prompt"]), "completion_tokens": new}
        return completion

    def refuse(self, message: str) -> None:
        self.answer(400, {"message": message})

    def answer(self, status: int, body: dict) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[Handler]]]:
    handler = type("Fresh", (Handler,), {"seen": [], "busy": [0, 0], "lock": threading.Lock()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1", handler
        running.shutdown()


def ask(url: str, model: str, prompts: list[str], **options: object) -> list[str | None]:
    """Return the texts of `complete`."""
    found = complete(url, model, prompts, **options)
    return [None if one is None else one.text for one in found]


def complete(
    url: str, model: str, prompts: list[str], **options: object
) -> list[Completion | None]:
    found: dict[int, Completion | None] = {}
    for part in request_completions(url, model, prompts, max_new_tokens=7, pause=0.01, **options):
        found |= part
    return [found[i] for i in range(len(prompts))]


def test_every_prompt_is_answered_in_its_place(
    server: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    prompts = [f"p{i}" for i in range(40)]
    assert ask(url, "m", prompts, concurrency=4) == [f"{p}!{p}" for p in prompts]
    assert handler.busy[1] <= 4
    assert {of["key"] for of in handler.seen} == {"Bearer secret"}
    assert {of["path"] for of in handler.seen} == {"/v1/completions"}
    assert handler.seen[0].items() >= {"max_tokens": 7, "temperature": 0.0, "model": "m"}.items()


def test_a_request_leaves_no_sampling_to_the_server(server: tuple) -> None:
    url, handler = server
    ask(url, "m", ["a"], temperature=0.5, seeds=[1])
    body = handler.seen[0]
    assert (body["top_p"], body["presence_penalty"], body["frequency_penalty"]) == (1, 0, 0)


def test_a_busy_server_is_asked_again(server: tuple) -> None:
    url, handler = server
    assert ask(url, "flaky", ["a", "b"]) == ["a!a", "b!b"]
    assert Counter(of["prompt"] for of in handler.seen) == {"a": 3, "b": 3}


def test_stops_are_sent_and_cut_off(server: tuple) -> None:
    url, handler = server
    assert ask(url, "m", ["word"], stops=["1", "2", "3", "4", "d!"]) == ["wor"]
    assert handler.seen[0]["stop"] == ["1", "2", "3", "4"]


def test_a_response_says_whether_it_was_cut_off(server: tuple) -> None:
    url, _ = server
    cut = Completion("x" * 7, truncated=True)
    assert complete(url, "short", ["abc"]) == [cut]
    assert complete(url, "short", ["abc"], stops=["x"]) == [Completion("")]
    assert complete(url, "m", ["a"]) == [Completion("a!a")]  # a server that does not say


def test_samples_carry_their_seeds(server: tuple) -> None:
    url, handler = server
    ask(url, "m", ["a", "b"], temperature=0.5, seeds=[3, 2**40 + 4])
    assert {of["prompt"]: of["seed"] for of in handler.seen} == {"a": 3, "b": 4}


# As servers word them: vLLM in entrypoints/openai/serving_engine.py and, later, in
# renderers/params.py; SGLang in srt/managers/tokenizer_manager.py.
ABOVE = "max_tokens={new}cannot be greater than max_model_len=max_total_tokens={context}. Please"
VLLM = "This model's maximum context length is {context} tokens. However, "
AT_LEAST = VLLM + (
    "you requested {new} output tokens and your prompt contains at least {counted} input tokens, "
    "for a total of at least {counted_sum} tokens. Please reduce the length of the input prompt"
)
SGLANG = (
    "Requested token count exceeds the model's maximum context length of {context} tokens. You "
    "requested a total of {sum} tokens: {size} tokens from the input messages and {new} tokens for"
)
REFUSALS = {
    "in the prompt": VLLM
    + "you requested {sum} tokens ({size} in the prompt, {new} in the completion).",
    "in your prompt": VLLM
    + "you requested {sum} tokens ({size} in your prompt; {new} for the completion).",
    "vLLM 0.10": "'max_tokens' or 'max_completion_tokens' is too large: {new}. This model's maximum "
    "context length is {context} tokens and your request has {size} input tokens ({new} > {left}).",
    "you passed": "You passed {counted} input tokens and requested {new} output tokens. However, "
    "the model's context length is only {context} tokens, resulting in a maximum input length of "
    "{left} tokens. Please reduce the length of the input prompt.",
    "you passed characters": "You passed {size} input characters and requested {new} output "
    "tokens. However, the model's context length is only {context} tokens, resulting in a maximum "
    "input length of {left} tokens (at most {left} characters).",
    "at least": AT_LEAST,
    "upper bound": VLLM + "you requested {new} output tokens and your prompt contains {size} "
    "characters (more than {left} characters, which is the upper bound for {left} input tokens).",
    "SGLang": SGLANG,
    "TGI": "`inputs` tokens + `max_new_tokens` must be <= {context}. Given: {size} `inputs` tokens",
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_a_prompt_that_fits_gets_fewer_new_tokens_and_one_that_does_not_none(
    server: tuple, refusal: str
) -> None:
    url, handler = server
    handler.refusal = refusal
    # The second fits with three new tokens, but not with the seven that it asks for.
    found = complete(url, "short", ["abc", "abcdefg", "abcdefghij", "abcdefghijk", "ab"])
    all_new, three = Completion("x" * 7, truncated=True), Completion("xxx", truncated=True)
    assert found == [all_new, three, None, None, all_new]


@pytest.mark.parametrize("context", [5, 7])
@pytest.mark.parametrize(
    ("refusal", "above"), [("at least", ABOVE), ("upper bound", ABOVE), ("SGLang", None)]
)
def test_new_tokens_beyond_the_whole_context_are_fewer_too(
    server: tuple, refusal: str, above: str | None, context: int
) -> None:
    url, handler = server
    handler.refusal, handler.above, handler.context = REFUSALS[refusal], above, context
    found = ask(url, "short", ["abc", "a", "x" * context, "x" * (context + 1)])
    assert found == ["x" * (context - 3), "x" * (context - 1), None, None]


@pytest.mark.parametrize(
    "refusal",
    [
        "the request exceeds the available context size. try increasing the context size",
        "The decoder prompt (length {size}) is longer than the maximum model length of {context}.",
        "The input ({size} tokens) is longer than the model's context length ({context} tokens).",
    ],
)
def test_a_server_that_ends_responses_itself_refuses_prompts_alone(
    server: tuple, refusal: str
) -> None:
    url, handler = server
    handler.refusal = refusal
    assert ask(url, "alone", ["abcdefg", "abcdefghij", "ab"]) == ["xxx", None, "x" * 7]


def test_a_server_may_refuse_a_context_that_is_filled_to_the_last(server: tuple) -> None:
    url, handler = server
    handler.refusal, handler.may_fill = SGLANG, False
    assert ask(url, "short", ["abc", "abcdefg", "abcdefghi"]) == ["x" * 6, "xx", None]


def test_a_server_may_reserve_tokens(server: tuple) -> None:
    url, handler = server
    handler.refusal, handler.reserved = SGLANG, 2
    assert ask(url, "short", ["a", "abcdefg", "abcdefgh"]) == ["x" * 7, "x", None]


def test_a_server_that_counts_no_tokens_of_prompts_is_taken_at_its_word(server: tuple) -> None:
    url, handler = server
    handler.refusal, handler.has_usage = SGLANG, False
    assert ask(url, "short", ["abcdefg", "abcdefghij"]) == ["xxx", None]
    handler.refusal = AT_LEAST
    with pytest.raises(EvalError, match=r"HTTP 400: .*at least 6 input tokens"):
        ask(url, "short", ["abcdefg"])


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (
            "it exceeds the context size",
            "refuses 7 new tokens .* does not say how many fit: .*size",
        ),
        ("its context length is 5", "refuses 7 new tokens .* does not say how many fit: .* is 5"),
        ("its context length is 20", "HTTP 400: .* is 20"),  # and refuses what would fit into it
    ],
)
def test_a_prompt_that_a_server_takes_is_never_too_long(
    server: tuple, refusal: str, message: str
) -> None:
    url, handler = server
    handler.refusal = refusal
    assert ask(url, "short", ["abc", "abcdefghij"]) == ["x" * 7, None]
    with pytest.raises(EvalError, match=message) as error:
        ask(url, "short", ["abcdefg"])
    assert error.value.subject == "served_model"


def test_other_refusals_are_errors(server: tuple) -> None:
    url, handler = server
    handler.refusal = "max_tokens must be positive"
    with pytest.raises(EvalError, match=r"HTTP 400: .*must be positive"):
        ask(url, "short", ["abcdefghijk"])


@pytest.mark.parametrize(
    ("model", "message", "subject"),
    [
        ("absent", "HTTP 404: .*no such model", "served_model"),
        ("odd", "is it a completions server", "server"),
    ],
)
def test_a_refusal_is_one_line(model: str, message: str, subject: str, server: tuple) -> None:
    with pytest.raises(EvalError, match=message) as error:
        ask(server[0], model, ["a"])
    assert error.value.subject == subject


def test_no_server_is_one_line() -> None:
    with pytest.raises(EvalError, match="does not answer"):
        ask("http://127.0.0.1:9/v1", "m", ["a"])
