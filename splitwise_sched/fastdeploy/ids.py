"""Their request ids, which may be any text, as ids that Redis keys and redis-cli users do not trip over. Pure."""

from __future__ import annotations

import hashlib
import re

from splitwise_sched.errors import InvalidRequest
from splitwise_sched.types import ID_PATTERN

MAX_USER_ID_BYTES = 4096
_ESCAPED, _DIGEST = "fd:", "fdh:"
_SAFE_BYTES = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_LOOKS_LIKE_A_RERUN = re.compile(r".*#[0-9]+", re.DOTALL)


def safe_id(user_id: object) -> str:
    """An id of this scheduler for one of theirs: the same one for the same text, another one for any other.

    What is a usable id stays as it is. Anything else is written with ``:hh`` for each odd byte, or, when that is too
    long, as a digest; either way the original id goes with the request's body.

    Raises:
        InvalidRequest: it is no text, empty, or longer than MAX_USER_ID_BYTES.
    """
    if not isinstance(user_id, str) or not user_id:
        raise InvalidRequest(f"request_id is {user_id!r}: it must be text, and not empty", param="request_id")
    try:
        raw = user_id.encode()
    except UnicodeEncodeError as exc:
        raise InvalidRequest(f"request_id {user_id[:80]!r} is not text that UTF-8 can hold: {exc}") from exc
    if len(raw) > MAX_USER_ID_BYTES:
        raise InvalidRequest(
            f"request_id {user_id[:80]!r}... takes {len(raw)} bytes: it may take {MAX_USER_ID_BYTES}",
            param="request_id",
        )
    if ID_PATTERN.fullmatch(user_id) and not user_id.startswith((_ESCAPED, _DIGEST)):
        return user_id
    escaped = _ESCAPED + "".join(chr(byte) if byte in _SAFE_BYTES else f":{byte:02x}" for byte in raw)
    return escaped if ID_PATTERN.fullmatch(escaped) else _DIGEST + hashlib.sha256(raw).hexdigest()


def run_name(user_id: str, epoch: int) -> str:
    """The request id that an engine sees: the user's own, and another one for each later run of the request.

    An engine that still works on a run which was taken from it can so not be taken for the one that has the request
    now. Prefill and decode find the same name, whichever way the request came to them. No two runs share a name: what
    ends in ``#`` and digits by itself gets the epoch from the first run on.
    """
    if epoch == 1 and not _LOOKS_LIKE_A_RERUN.fullmatch(user_id):
        return user_id
    return f"{user_id}#{epoch}"
