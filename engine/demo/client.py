"""Sends the demo's requests over HTTP, as any OpenAI client would, and times what comes back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import httpx

from engine.demo.workload import DemoRequest
from splitwise_sched.errors import SplitwiseError

TIMEOUT_S = 300.0


class DemoRequestFailed(SplitwiseError):
    """The gateway refused or ended a request of the demo."""


@dataclass(frozen=True, slots=True)
class Answer:
    """
    Attributes:
        ttft_s: from the request to its first token, at the client.
        tpot_s: mean time a token after the first; 0 with one token.
    """

    request: DemoRequest
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    ttft_s: float
    tpot_s: float


async def complete(
    client: httpx.AsyncClient, model: str, request: DemoRequest, on_text: Callable[[str], None] | None = None
) -> Answer:
    """Stream one completion. Raises DemoRequestFailed."""
    body = {
        "model": model,
        "prompt": list(request.prompt_token_ids),
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
    }
    started = time.monotonic()
    first = last = 0.0
    token_ids: list[int] = []
    text, finish_reason = "", ""
    headers = {"X-Request-Id": request.request_id}
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        if response.status_code != 200:
            detail = (await response.aread()).decode(errors="replace")
            raise DemoRequestFailed(f"{request.request_id} was refused with HTTP {response.status_code}: {detail}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise DemoRequestFailed(f"{request.request_id} failed: {event['error'].get('message')}")
            for choice in event.get("choices", ()):
                if choice.get("token_ids"):
                    last = time.monotonic()
                    first = first or last
                    token_ids += choice["token_ids"]
                if choice.get("text"):
                    text += choice["text"]
                    if on_text is not None:
                        on_text(choice["text"])
                finish_reason = choice.get("finish_reason") or finish_reason
    tpot_s = (last - first) / (len(token_ids) - 1) if len(token_ids) > 1 else 0.0
    return Answer(request, tuple(token_ids), text, finish_reason, first - started, tpot_s)


async def keep_completing(
    client: httpx.AsyncClient,
    model: str,
    requests: Sequence[DemoRequest],
    goes_on: Callable[[], bool],
    on_done: Callable[[], None],
) -> tuple[list[Answer], list[str]]:
    """One stream for each of ``requests`` at a time, again and again under new ids as long as it ``goes_on``.

    Returns:
        The answers, and what went wrong with the others.
    """
    answers: list[Answer] = []
    failures: list[str] = []

    async def keep(request: DemoRequest) -> None:
        turn = 0
        while not turn or goes_on():
            turn += 1
            try:
                again = replace(request, request_id=f"{request.request_id}-{turn}")
                answers.append(await complete(client, model, again))
            except (DemoRequestFailed, httpx.HTTPError) as exc:
                failures.append(str(exc) or repr(exc))
            on_done()

    await asyncio.gather(*map(keep, requests))
    return answers, failures


async def complete_all(
    client: httpx.AsyncClient,
    model: str,
    requests: Sequence[DemoRequest],
    concurrency: int,
    on_done: Callable[[Answer], None],
) -> list[Answer]:
    """All of them, ``concurrency`` at a time; [num_requests] in the order of ``requests``."""
    places = asyncio.Semaphore(concurrency)

    async def one(request: DemoRequest) -> Answer:
        async with places:
            answer = await complete(client, model, request)
            on_done(answer)
            return answer

    return list(await asyncio.gather(*map(one, requests)))
