"""Request responses from an OpenAI-compatible completions server, such as vLLM's."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from eval.errors import EvalError

RETRIES = 5
RETRIED_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504)  # HTTP; the server may recover
MAX_STOPS = 4  # that the protocol allows in a request


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
) -> Iterator[dict[int, str]]:
    """Yield the server's completion of each prompt as it comes, as {index: text}.

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
        EvalError: the server refuses, or does not answer after the repetitions; the message says
            what it answered.
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
            }
            if stops:
                body["stop"] = list(stops[:MAX_STOPS])
            if temperature:
                body["seed"] = seeds[index] % 2**31  # a signed 32-bit integer
            futures[pool.submit(_request_text, session, address, body, timeout)] = index
        try:
            for future in as_completed(futures):
                yield {futures[future]: _cut_at_stops(future.result(), stops)}
        finally:
            # After an error, or if the caller stops, requests that wait are not sent.
            pool.shutdown(cancel_futures=True)


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


def _request_text(session: requests.Session, address: str, body: dict, timeout: float) -> str:
    try:
        answer = session.post(address, json=body, timeout=timeout)
    except requests.RequestException as error:
        raise EvalError(
            f"{address} does not answer ({type(error).__name__}); check the server",
            subject="server",
        ) from None
    if answer.status_code != 200:
        raise EvalError(
            f"{answer.url} answers HTTP {answer.status_code}: {answer.text[:300]}",
            subject="served_model",
        )
    try:
        text = answer.json()["choices"][0]["text"]
    except (ValueError, KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise EvalError(
            f"{answer.url} answers with no choices[0].text; is it a completions server?",
            subject="server",
        )
    return text


def _cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """Return `text` up to the first of `stops` in it."""
    cuts = [position for stop in stops if (position := text.find(stop)) >= 0]
    return text[: min(cuts)] if cuts else text
