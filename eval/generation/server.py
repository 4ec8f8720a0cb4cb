"""Request responses from an OpenAI-compatible completions server, such as vLLM's."""

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from eval.errors import EvalError
from eval.generation.decoding import Completion, cut_at_stops

RETRIES = 5
RETRIED_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504)  # HTTP; the server may recover
MAX_STOPS = 4  # that the protocol allows in a request
# Sent with every request: what a request leaves out, a server may take from the model's
# generation_config.json, as vLLM does.
SAMPLING = {"top_p": 1, "presence_penalty": 0, "frequency_penalty": 0}
# How servers refuse a prompt that is too long for the model. The protocol fixes neither the status
# nor the words: vLLM, OpenAI, SGLang and llama.cpp answer 400, text-generation-inference 422.
OVERLONG_STATUSES = (400, 413, 422)
_OVERLONG = re.compile(
    r"context[ _](length|size|window)|maximum (model|input|sequence|prompt) length|max_model_len"
    r"|(prompt|input)\b.{0,40}\b(too long|longer than)|inputs` tokens \+ `max_new_tokens",
    re.IGNORECASE,
)
# The tokens of the context, in the refusal of a prompt that fits, but not with all new tokens.
_LIMIT = re.compile(
    r"(?:context length (?:is|of)(?: only)? |must be <= |max_model_len=(?:max_total_tokens=)?)(\d+)",
    re.IGNORECASE,
)
_PROMPT = re.compile(
    r"(\d+) (?:in (?:the|your) (?:prompt|messages)|input tokens|`inputs` tokens|tokens from the input)"
)


def request_completions(
    url: str,
    model: str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stops: Sequence[str] = (),
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
    concurrency: int = 16,
    timeout: float = 600.0,
    pause: float = 0.5,
) -> Iterator[dict[int, Completion | None]]:
    """Yield the server's completion of each prompt as it comes, as {index: completion}.

    A prompt that the server refuses as too long for the model, with one new token too, has None. One
    that fits the model's context, but not with `max_new_tokens`, is asked for as many as fit: so it
    is with transformers too.

    Args:
        url: up to and including /v1, such as http://localhost:8000/v1. The key is $OPENAI_API_KEY,
            if it is set.
        model: its name on the server; an adapter's name if the server holds adapters.
        stops: texts that end a response. The server gets the first four; all are cut off here.
        seeds: of each prompt, if the temperature is not 0.
        concurrency: requests at the same time.
        timeout: seconds for one request.
        pause: seconds before the second of RETRIES repetitions; it doubles before each further one.

    Raises:
        EvalError: the server refuses, does not answer after the repetitions, or does not say how
            many new tokens fit; the message says what it answered.
    """
    address = f"{url.rstrip('/')}/completions"
    with (
        _open_session(concurrency, pause) as session,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        futures = {}
        for index, prompt in enumerate(prompts):
            body = {
                "model": model,
                "prompt": prompt,
                "max_tokens": max_new_tokens,
                "temperature": temperature,
                **SAMPLING,
            }
            if stops:
                body["stop"] = list(stops[:MAX_STOPS])
            if temperature:
                body["seed"] = seeds[index] % 2**31  # a signed 32-bit integer
            futures[pool.submit(_request_completion, session, address, body, timeout)] = index
        try:
            for future in as_completed(futures):
                yield {futures[future]: _cut_completion(future.result(), stops)}
        finally:
            # After an error, or if the caller stops, requests that wait are not sent.
            pool.shutdown(cancel_futures=True)


def _cut_completion(completion: Completion | None, stops: Sequence[str]) -> Completion | None:
    """Cut a completion at the first of `stops` in it, which is then its end."""
    if completion is None:
        return None
    text = cut_at_stops(completion.text, stops)
    return Completion(text, completion.truncated and text == completion.text)


def _open_session(concurrency: int, pause: float) -> requests.Session:
    retry = Retry(
        RETRIES,
        backoff_factor=pause,
        status_forcelist=RETRIED_STATUSES,
        allowed_methods=None,  # POST too, which urllib3 does not repeat by default
        raise_on_status=False,
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=concurrency, max_retries=retry))
    if key := os.environ.get("OPENAI_API_KEY"):
        session.headers["Authorization"] = f"Bearer {key}"
    return session


def _request_completion(
    session: requests.Session, address: str, body: dict, timeout: float
) -> Completion | None:
    """Return the completion, or None if the prompt is too long for the model."""
    answer = _post(session, address, body, timeout)
    if not _says_overlong(answer):
        return _read_completion(answer)
    # A refusal does not tell whether the prompt itself is too long: vLLM stops counting it where it
    # exceeds what `max_tokens` leaves of the context. So ask for one token. `max_tokens: null`, all
    # that the context leaves, ends in HTTP 500 from vLLM (its issue 19862); other servers refuse it.
    shortest = _post(session, address, body | {"max_tokens": 1}, timeout)
    if _says_overlong(shortest):
        return None
    _read_completion(shortest)  # raises if the server refuses for another reason
    room = min(_find_room(answer.text, _read_prompt_length(shortest)), body["max_tokens"] - 1)
    if room < 1:
        raise EvalError(
            f"{answer.url} refuses {body['max_tokens']} new tokens after a prompt that it takes, and "
            f"does not say how many fit: {answer.text[:300]}; serve the model with a longer context",
            subject="served_model",
        )
    answer = _post(session, address, body | {"max_tokens": room}, timeout)
    if _says_overlong(answer) and room > 1:
        # Until its pull request 22546, SGLang refuses tokens that fill the context to the last.
        answer = _post(session, address, body | {"max_tokens": room - 1}, timeout)
    return _read_completion(answer)


def _post(session: requests.Session, address: str, body: dict, timeout: float) -> requests.Response:
    try:
        return session.post(address, json=body, timeout=timeout)
    except requests.RequestException as error:
        raise EvalError(
            f"{address} does not answer ({type(error).__name__}); check the server",
            subject="server",
        ) from None


def _says_overlong(answer: requests.Response) -> bool:
    is_refusal = answer.status_code in OVERLONG_STATUSES
    return is_refusal and _OVERLONG.search(answer.text) is not None


def _find_room(refusal: str, counted: int) -> int:
    """Return the new tokens that fit beside the prompt, or 0 if the server does not say it.

    Args:
        counted: tokens of the prompt in the answer to a request that fits, or 0 if it has none.
    """
    limit, prompt = _LIMIT.search(refusal), _PROMPT.search(refusal)
    # The larger number is right: that of vLLM's refusal is a lower bound, and that of SGLang's has
    # the tokens that speculative decoding reserves besides.
    length = max(counted, int(prompt[1]) if prompt else 0)
    return int(limit[1]) - length if limit and length else 0


def _read_prompt_length(answer: requests.Response) -> int:
    """Return the tokens of the prompt that an answer was made from, or 0 if it does not say it."""
    try:
        return int(answer.json()["usage"]["prompt_tokens"])
    except (ValueError, KeyError, TypeError):
        return 0


def _read_completion(answer: requests.Response) -> Completion:
    if answer.status_code != 200:
        raise EvalError(
            f"{answer.url} answers HTTP {answer.status_code}: {answer.text[:300]}",
            subject="served_model",
        )
    try:
        choice = answer.json()["choices"][0]
        text = choice["text"]
    except (ValueError, KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise EvalError(
            f"{answer.url} answers with no choices[0].text; is it a completions server?",
            subject="server",
        )
    return Completion(text, truncated=choice.get("finish_reason") == "length")
