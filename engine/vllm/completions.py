"""vLLM's ``/v1/completions``: what a run asks for, and what an answer says. Pure; nothing in an answer is trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from engine.vllm.parts import Part, RunFailed
from splitwise_sched.types import Request, TokenLogprob

MAX_EVENT_BYTES = 1 << 20
MAX_TOKEN_ID = 1 << 31
MAX_MESSAGE_CHARS = 300
TOKEN_PREFIX = "token_id:"
END = b"[DONE]"
# What the server would fill in from its model's generation_config.json, and requests have no field for.
NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def body_of(
    request: Request, *, model: str, max_tokens: int, transfer: Mapping[str, Any] | None, key: str, is_streamed: bool
) -> dict[str, Any]:
    """
    Args:
        max_tokens: of this run.
        transfer: ``kv_transfer_params``.
        key: of the run; vLLM's log has it in the request's id.
    """
    s = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.input_token_ids),
        "request_id": key,
        "max_tokens": max_tokens,
        "temperature": s.temperature,
        "top_p": s.top_p,
        "top_k": s.top_k,
        **NEUTRAL,
        "stop": list(s.stop),
        "stop_token_ids": list(s.stop_token_ids),
        "ignore_eos": s.ignore_eos,
        "stream": is_streamed,
        "return_token_ids": True,
    }
    if s.seed is not None:
        body["seed"] = s.seed
    if s.logprobs is not None:
        body.update(logprobs=s.logprobs, return_tokens_as_token_ids=True)
    if transfer is not None:
        body["kv_transfer_params"] = dict(transfer)
    return body


class Events:
    """Server-sent events out of the bytes of a stream."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What stands after ``data:`` in each line that is whole by now. Raises RunFailed."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise RunFailed(f"vLLM sent an event of more than {MAX_EVENT_BYTES} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def payload_of(text: bytes) -> dict[str, Any]:
    """An answer or an event. Raises RunFailed, also when it tells of an error: what vLLM refuses, it does not begin."""
    try:
        payload = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise RunFailed(f"vLLM's answer is not JSON: {text[:80]!r}") from exc
    if not isinstance(payload, dict):
        raise RunFailed(f"vLLM's answer is no object: {text[:80]!r}")
    if payload.get("error") is not None:
        raise RunFailed(f"vLLM: {message_of(text)}")
    return payload


def message_of(body: bytes) -> str:
    """What an answer that is an error says, short."""
    try:
        found = json.loads(body)
        error = found.get("error", found.get("detail"))
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, RecursionError, AttributeError, KeyError):
        text = None
    if not isinstance(text, str):
        text = body.decode(errors="replace")
    return " ".join(text.split())[:MAX_MESSAGE_CHARS] or "it says nothing"


def part_of(payload: Mapping[str, Any], *, has_logprobs: bool, limit: int) -> Part | None:
    """What is new in an answer or an event; None when it has no choice, as that with the usage.

    Args:
        limit: tokens that may still come.
    Raises:
        RunFailed: it is not what was asked for.
    """
    try:
        choices = payload["choices"]
        if not choices:
            return None
        (choice,) = choices
        token_ids = choice["token_ids"] or []
        if not all(type(t) is int and 0 <= t < MAX_TOKEN_ID for t in token_ids):
            raise ValueError("token_ids are no token ids")
        if len(token_ids) > limit:
            raise ValueError(f"{len(token_ids)} tokens, where {limit} were left")
        finish, stop, transfer = choice.get("finish_reason"), choice.get("stop_reason"), _transfer(payload)
        if not isinstance(finish, str | None) or not isinstance(stop, str | int | None):
            raise ValueError("finish_reason is no text")
        logprobs = _logprobs(token_ids, choice["logprobs"]) if has_logprobs and token_ids else ()
        return Part(tuple(token_ids), logprobs, finish, stop, transfer=transfer)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
        raise RunFailed(f"vLLM's answer cannot be used: {type(exc).__name__} {str(exc)[:200]}") from exc


def _transfer(payload: Mapping[str, Any]) -> Mapping[str, Any] | None:
    transfer = payload.get("kv_transfer_params")
    if not isinstance(transfer, dict | None):
        raise ValueError("kv_transfer_params is no object")
    return transfer


def _logprobs(token_ids: list[int], found: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
    """vLLM gives the chosen token and the most likely ones in one mapping."""
    chosen, tops = found["token_logprobs"], found["top_logprobs"]
    if not len(token_ids) == len(chosen) == len(tops):
        raise ValueError("logprobs are not one a token")
    logprobs = []
    for token_id, logprob, top in zip(token_ids, chosen, tops, strict=True):
        ranked = sorted(((_token_id(name), _number(value)) for name, value in top.items()), key=lambda item: -item[1])
        logprobs.append(TokenLogprob(token_id, _number(logprob), tuple(ranked)))
    return tuple(logprobs)


def _token_id(name: str) -> int:
    if not name.startswith(TOKEN_PREFIX):
        raise ValueError(f"{name[:40]!r} is no token id")
    return int(name.removeprefix(TOKEN_PREFIX))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(f"{str(value)[:40]!r} is no logprob")
    return float(value)
