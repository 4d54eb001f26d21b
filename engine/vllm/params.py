"""``kv_transfer_params``: what a prefill request is asked for, what it answers, and what decode is told.

The names that proxies know from other connectors keep their meaning: prefill gets ``do_remote_decode``, answers with
parameters that go to decode as they are, and those say ``do_remote_prefill``. Beside them:

    transfer_id         name of the transfer; prefill makes one up when it is not given
    remote_endpoints    how to reach the ranks of the prefill instance (kv_transfer.endpoints_to_text)
    remote_num_tokens   prompt tokens whose KV is there

Decode answers with ``kv_load_failed`` when the KV did not come and it computed the prompt itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kv_transfer.endpoint import RankEndpoint, endpoints_from_text, endpoints_to_text
from kv_transfer.errors import KVTransferError
from splitwise_sched.errors import SplitwiseError

TRANSFER_ID = re.compile(r"[A-Za-z0-9._:@-]{1,200}")
MAX_TOKENS = 1 << 31
LOAD_FAILED = {"kv_load_failed": True}


class InvalidTransferParams(SplitwiseError):
    """``kv_transfer_params`` of a request that this connector cannot use; says which of them, and why."""


@dataclass(frozen=True, slots=True)
class SendParams:
    """Prefill: keep the KV until decode has it.

    Attributes:
        transfer_id: None: make one up.
    """

    transfer_id: str | None


@dataclass(frozen=True, slots=True)
class ReceiveParams:
    """Decode: take the KV of the first ``num_tokens`` tokens from these ranks."""

    transfer_id: str
    source: tuple[RankEndpoint, ...]
    num_tokens: int


def parse_params(raw: Mapping[str, Any] | None) -> SendParams | ReceiveParams | None:
    """None when nothing is to be transferred. They come from outside and are trusted in nothing.

    Raises:
        InvalidTransferParams
    """
    if not raw:
        return None
    send, receive = bool(raw.get("do_remote_decode")), bool(raw.get("do_remote_prefill"))
    if send and receive:
        raise InvalidTransferParams("do_remote_decode and do_remote_prefill exclude each other: give one of them")
    if not (send or receive):
        return None
    transfer_id = raw.get("transfer_id")
    if transfer_id is not None and not (isinstance(transfer_id, str) and TRANSFER_ID.fullmatch(transfer_id)):
        raise InvalidTransferParams(
            f"transfer_id is {str(transfer_id)[:80]!r}: give 1 to 200 characters of A-Z a-z 0-9 . _ : @ -"
        )
    if send:
        return SendParams(transfer_id)
    if transfer_id is None:
        raise InvalidTransferParams("transfer_id is missing: pass on what the prefill request answered")
    num_tokens = raw.get("remote_num_tokens")
    if type(num_tokens) is not int or not 1 <= num_tokens <= MAX_TOKENS:
        raise InvalidTransferParams(
            f"remote_num_tokens is {str(num_tokens)[:80]!r}: pass on what the prefill request answered"
        )
    try:
        source = tuple(endpoints_from_text(str(raw.get("remote_endpoints", ""))))
    except KVTransferError as exc:
        raise InvalidTransferParams(f"remote_endpoints cannot be used: {exc}") from exc
    return ReceiveParams(transfer_id, source, num_tokens)


def decode_params(
    transfer_id: str, endpoints: list[RankEndpoint] | str, num_tokens: int, engine_id: str | None = None
) -> dict[str, Any]:
    """What decode is to be given."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "transfer_id": transfer_id,
        "remote_endpoints": endpoints if isinstance(endpoints, str) else endpoints_to_text(endpoints),
        "remote_num_tokens": num_tokens,
        "remote_engine_id": engine_id,
    }
