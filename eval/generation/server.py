"""Responses from an OpenAI-compatible completions server, such as vLLM's."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from eval.errors import EvalError

RETRIES = 5
RETRIED = (
    408,
    409,
    425,
    429,
    500,
    502,
    503,
    504,
)  # HTTP statuses of a server that may do better later


def complete(
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
    """The server's completion of each prompt, as each comes: {index: text}.

    Args:
        url: up to and with /v1, such as http://localhost:8000/v1. The key is $OPENAI_API_KEY, where it is set.
        model: the name under which the server has it; an adapter's name for a server that holds adapters.
        stops: at most four go to the server (the protocol's limit); all are cut off here.
        concurrency: requests under way at once. timeout: seconds of one request.
        pause: seconds before the second of RETRIES repetitions, twice as many before each further one.

    Raises:
        EvalError: the server refuses, or does not answer after the repetitions; the message has its words.
    """
    place = f"{url.rstrip('/')}/completions"
    retry = Retry(
        RETRIES,
        backoff_factor=pause,
        status_forcelist=RETRIED,
        allowed_methods=None,
        raise_on_status=False,
    )
    with requests.Session() as session, ThreadPoolExecutor(concurrency) as pool:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(pool_maxsize=concurrency, max_retries=retry))
        if key := os.environ.get("OPENAI_API_KEY"):
            session.headers["Authorization"] = f"Bearer {key}"

        def one(index: int) -> str:
            body = {
                "model": model,
                "prompt": prompts[index],
                "max_tokens": max_new_tokens,
                "temperature": temperature,
            }
            body |= {"stop": list(stops[:4])} if stops else {}
            body |= {"seed": seeds[index] % 2**31} if temperature else {}
            try:
                answer = session.post(place, json=body, timeout=timeout)
            except requests.RequestException as error:
                raise EvalError(
                    f"--url: {place} does not answer ({type(error).__name__}); check the server"
                ) from None
            text = _text(answer)
            return text[: min([len(text), *(at for stop in stops if (at := text.find(stop)) >= 0)])]

        futures = {pool.submit(one, index): index for index in range(len(prompts))}
        try:
            for future in as_completed(futures):
                yield {futures[future]: future.result()}
        finally:
            pool.shutdown(cancel_futures=True)


def _text(answer: requests.Response) -> str:
    if answer.status_code != 200:
        raise EvalError(
            f"--url: {answer.url} answers HTTP {answer.status_code}: {answer.text[:300]}; check --model"
        )
    try:
        text = answer.json()["choices"][0]["text"]
    except (ValueError, KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise EvalError(
            f"--url: {answer.url} answers with no choices[0].text; is it a completions server?"
        )
    return text
