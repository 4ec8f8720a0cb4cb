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
    refusal: str  # of a prompt that is too long

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
        elif body["model"] == "short":  # 10 tokens of context; a letter is a token
            self.answer_short(body)
        elif body["model"] == "odd":
            self.answer(200, {"choices": []})
        else:
            self.answer(200, {"choices": [{"text": f"{body['prompt']}!{body['prompt']}"}]})
        with self.lock:
            self.busy[0] -= 1

    def answer_short(self, body: dict) -> None:
        size, new = len(body["prompt"]), body["max_tokens"]
        if size + new <= 10:
            self.answer(200, {"choices": [{"text": "x" * new, "finish_reason": "length"}]})
        else:
            self.answer(400, {"message": self.refusal.format(size=size, new=new, sum=size + new)})

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


# As servers word them. The last two do not say how many new tokens fit.
VLLM = "This model's maximum context length is 10 tokens. However, "
REFUSALS = [
    (VLLM + "you requested {sum} tokens ({size} in the prompt, {new} in the completion).", True),
    (VLLM + "you requested {sum} tokens ({size} in your prompt; {new} for the completion).", True),
    (VLLM + "your request has {size} input tokens plus {new} 'max_tokens'.", True),
    ("`inputs` tokens + `max_new_tokens` must be <= 10. Given: {size} `inputs` tokens", True),
    ("the request exceeds the available context size. try increasing the context size", False),
    ("The decoder prompt (length {size}) is longer than the maximum model length of 10.", False),
]


@pytest.mark.parametrize(("refusal", "says_room"), REFUSALS)
def test_a_prompt_that_is_too_long_has_no_response(
    server: tuple, refusal: str, says_room: bool
) -> None:
    url, handler = server
    handler.refusal = refusal
    # The second fits with three new tokens, but not with the seven that it asks for.
    found = ask(url, "short", ["abc", "abcdefg", "abcdefghij", "abcdefghijk", "ab"])
    assert found == ["x" * 7, "xxx" if says_room else None, None, None, "x" * 7]


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
