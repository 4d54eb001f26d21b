"""Outputs as text in a front end's stream: one field a request, one entry an engine step.

``<epoch>:<index>:<token id> <token id> ...[:<JSON>]``, where the JSON object holds what is rarely there: logprobs, how
the request ended, what was measured, what an embedding program added. An instance's loss is told in the same stream, as
``{"lost": "<why>"}``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from splitwise_sched.codec import MAX_TOKEN_ID
from splitwise_sched.errors import SplitwiseError
from splitwise_sched.types import FinishReason, Output, TokenLogprob

logger = logging.getLogger(__name__)

MAX_CHUNK_CHARS = 4 << 20
MAX_EPOCH, MAX_INDEX = 2**53, 2**31

_encode_json = json.JSONEncoder(separators=(",", ":")).encode


class MalformedOutput(SplitwiseError):
    """A field in a front end's stream that no instance of this version writes."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The request's instance died or gave it back; ``epoch`` is the one under which it may be put back."""

    request_id: str
    epoch: int
    reason: str


def encode_output(output: Output) -> str:
    text = f"{output.epoch}:{output.index}:{' '.join(map(str, output.token_ids))}"
    extra: dict[str, Any] = {}
    if output.logprobs:
        extra["logprobs"] = [[p.token_id, p.logprob, *(list(t) for t in p.top)] for p in output.logprobs]
    if output.finish_reason is not None:
        extra["finish"] = output.finish_reason.value
        if output.stop_reason is not None:
            extra["stop"] = output.stop_reason
        if output.detail is not None:
            extra["detail"] = output.detail
        if output.stats:
            extra["stats"] = dict(output.stats)
    if output.extra is not None:
        extra["extra"] = dict(output.extra)
    return f"{text}:{_encode_json(extra)}" if extra else text


def decode_output(request_id: str, value: str) -> Output | Lost:
    """Raises MalformedOutput; nothing in ``value`` is trusted."""
    try:
        if len(value) > MAX_CHUNK_CHARS:
            raise ValueError(f"{len(value)} characters")
        epoch_text, index_text, tokens, *rest = value.split(":", 3)
        epoch, index, token_ids = int(epoch_text), int(index_text), tuple(map(int, tokens.split()))
        _check(epoch, index, token_ids)
        if not rest:
            return Output(request_id, epoch, index, token_ids)
        extra = json.loads(rest[0])
        if not isinstance(extra, dict):
            raise ValueError("no JSON object")
        if "lost" in extra:
            return Lost(request_id, epoch, str(extra["lost"]))
        finish = extra.get("finish")
        stop = extra.get("stop")
        stats = extra.get("stats")
        more = extra.get("extra")
        return Output(
            request_id=request_id,
            epoch=epoch,
            index=index,
            token_ids=token_ids,
            logprobs=tuple(_logprob(p) for p in extra.get("logprobs", ())),
            finish_reason=None if finish is None else FinishReason(finish),
            stop_reason=stop if isinstance(stop, (str, int)) else None,
            detail=None if extra.get("detail") is None else str(extra["detail"]),
            stats=stats if isinstance(stats, dict) else None,
            extra=more if isinstance(more, dict) else None,
        )
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError) as exc:
        raise MalformedOutput(f"output of {request_id} is not readable: {value[:200]!r} ({exc})") from exc


def decode_outputs(request_id: str, values: Iterable[str]) -> list[Output | Lost]:
    """Outputs of one request that came together; tokens alone that go on from each other are put into one.

    What is not readable is left out, with a warning.
    """
    outputs: list[Output | Lost] = []
    # The run that grows: tokens of one epoch from one index on.
    epoch, index = 0, 0
    run: list[int] = []
    for value in values:
        try:
            if value.count(":") == 2 and len(value) <= MAX_CHUNK_CHARS:
                epoch_text, index_text, tokens = value.split(":")
                if not run or int(epoch_text) != epoch or int(index_text) != index + len(run):
                    _close_run(outputs, request_id, epoch, index, run)
                    run = []
                    epoch, index = int(epoch_text), int(index_text)
                token_ids = [*map(int, tokens.split())]
                _check(epoch, index, token_ids)
                run += token_ids
            else:
                output = decode_output(request_id, value)
                _close_run(outputs, request_id, epoch, index, run)
                run = []
                outputs.append(output)
        except (ValueError, MalformedOutput) as exc:
            logger.warning("output of %s is left out: %r (%s)", request_id, value[:200], exc)
    _close_run(outputs, request_id, epoch, index, run)
    return outputs


def _close_run(outputs: list[Output | Lost], request_id: str, epoch: int, index: int, run: list[int]) -> None:
    if run:
        outputs.append(Output(request_id, epoch, index, tuple(run)))


def _check(epoch: int, index: int, token_ids: Sequence[int]) -> None:
    """Raises ValueError: numbers that no instance gives, and that would not fit into a body."""
    if not (0 < epoch <= MAX_EPOCH and 0 <= index <= MAX_INDEX):
        raise ValueError("epoch or position out of range")
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) <= MAX_TOKEN_ID):
        raise ValueError("token id out of range")


def _logprob(raw: Any) -> TokenLogprob:
    return TokenLogprob(int(raw[0]), float(raw[1]), tuple((int(t), float(p)) for t, p in raw[2:]))
