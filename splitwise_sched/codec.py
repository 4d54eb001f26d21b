"""Request bodies as bytes: versioned msgpack, bounded, checked field by field on the way in."""

from __future__ import annotations

import sys
from array import array
from typing import Any

import msgpack

from splitwise_sched.errors import InvalidRequest
from splitwise_sched.types import Request, SamplingParams

BODY_VERSION = 1
MAX_BODY_BYTES = 8 << 20
MAX_TOKEN_ID = 2**32 - 1
MAX_METADATA_ITEMS = 1 << 20

_SAMPLING_TYPES: dict[str, tuple[type, ...]] = {
    "max_tokens": (int,),
    "temperature": (float, int),
    "top_p": (float, int),
    "top_k": (int,),
    "seed": (int, type(None)),
    "stop": (list,),
    "stop_token_ids": (list,),
    "ignore_eos": (bool,),
    "logprobs": (int, type(None)),
}
_SAMPLING_NAMES = tuple(_SAMPLING_TYPES)
# Types of the parameters, in this order, that were found in order: there are few, and looking each up takes its time.
_SAMPLING_SEEN: set[tuple[type, ...]] = set()


def encode_request(request: Request) -> bytes:
    """Raises InvalidRequest: it takes more than MAX_BODY_BYTES, or its metadata is not made of JSON values."""
    body: bytes = msgpack.packb(
        {
            "v": BODY_VERSION,
            "id": request.request_id,
            "model": request.model,
            "prompt": _pack_ids(request.prompt_token_ids),
            "emitted": _pack_ids(request.emitted_token_ids),
            "sampling": {name: getattr(request.sampling, name) for name in _SAMPLING_TYPES},
            "timeout_s": request.timeout_s,
            "priority": request.priority,
            "tenant": request.tenant,
            "prefer": list(request.prefer),
            "metadata": _pack_metadata(request),
        }
    )
    if len(body) > MAX_BODY_BYTES:
        raise InvalidRequest(
            f"request {request.request_id} takes {len(body)} bytes, more than {MAX_BODY_BYTES}: shorten its prompt, or "
            "what it carries along",
            param="prompt",
        )
    return body


def decode_request(body: bytes) -> Request:
    """The request in ``body``, which comes from outside this process and is trusted in nothing.

    Raises:
        InvalidRequest: not a body of this version, or a field of it is not what it must be.
    """
    if len(body) > MAX_BODY_BYTES:
        raise InvalidRequest(f"request body of {len(body)} bytes is larger than {MAX_BODY_BYTES}")
    try:
        raw = msgpack.unpackb(body, raw=False, strict_map_key=True, max_map_len=64, max_array_len=1 << 16)
    except (ValueError, msgpack.UnpackException, UnicodeDecodeError) as exc:
        raise InvalidRequest(f"request body is not readable msgpack: {exc}") from exc
    if not isinstance(raw, dict) or raw.get("v") != BODY_VERSION:
        version = raw.get("v") if isinstance(raw, dict) else type(raw).__name__
        raise InvalidRequest(
            f"request body has version {version!r}, this process reads {BODY_VERSION}: run one version on a topic"
        )
    timeout = raw.get("timeout_s")
    if timeout is not None and not isinstance(timeout, (int, float)):
        raise InvalidRequest(f"timeout_s in a request body is {timeout!r}: it must be a number")
    return Request(
        request_id=_text(raw, "id"),
        model=_text(raw, "model"),
        prompt_token_ids=_unpack_ids(raw, "prompt"),
        emitted_token_ids=_unpack_ids(raw, "emitted"),
        sampling=_sampling(raw.get("sampling")),
        timeout_s=timeout,
        priority=_text(raw, "priority"),
        tenant=_text(raw, "tenant"),
        prefer=_texts(raw, "prefer"),
        metadata=_unpack_metadata(raw.get("metadata", b"")),
    )


def _text(raw: dict[str, Any], name: str) -> str:
    value = raw.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} in a request body is {type(value).__name__}, not text")
    return value


def _texts(raw: dict[str, Any], name: str) -> tuple[str, ...]:
    value = raw.get(name)
    if value == []:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidRequest(f"{name} in a request body is not a list of texts")
    return tuple(value)


def _sampling(raw: object) -> SamplingParams:
    if not isinstance(raw, dict) or not raw.keys() <= _SAMPLING_TYPES.keys():
        raise InvalidRequest("sampling in a request body is not a map of the known parameters")
    is_whole = tuple(raw) == _SAMPLING_NAMES
    types = tuple(map(type, raw.values()))
    if not is_whole or types not in _SAMPLING_SEEN:
        for name, value in raw.items():
            allowed = _SAMPLING_TYPES[name]
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                raise InvalidRequest(f"{name} in a request body is {value!r}", param=name)
        if is_whole:
            _SAMPLING_SEEN.add(types)
    stop, stop_ids = raw.get("stop"), raw.get("stop_token_ids")
    if stop and not all(isinstance(s, str) for s in stop):
        raise InvalidRequest("stop in a request body holds something that is not text", param="stop")
    if stop_ids and not all(isinstance(t, int) for t in stop_ids):
        raise InvalidRequest("stop_token_ids in a request body holds something that is no token id", param="stop")
    return SamplingParams(**{**raw, "stop": tuple(stop or ()), "stop_token_ids": tuple(stop_ids or ())})


def _pack_metadata(request: Request) -> bytes:
    """Packed by itself: what it may hold is bounded otherwise than the body around it."""
    if not request.metadata:
        return b""
    try:
        packed: bytes = msgpack.packb(dict(request.metadata))
    except (TypeError, ValueError, OverflowError) as exc:
        raise InvalidRequest(
            f"metadata of request {request.request_id} is not made of JSON values: {exc}", param="metadata"
        ) from exc
    return packed


def _unpack_metadata(packed: object) -> dict[str, Any]:
    if packed == b"":
        return {}
    if not isinstance(packed, bytes):
        raise InvalidRequest(f"metadata in a request body is {type(packed).__name__}, not packed bytes")
    try:
        metadata = msgpack.unpackb(
            packed, raw=False, strict_map_key=True, max_map_len=MAX_METADATA_ITEMS, max_array_len=MAX_METADATA_ITEMS
        )
    except (ValueError, msgpack.UnpackException, UnicodeDecodeError) as exc:
        raise InvalidRequest(f"metadata in a request body is not readable msgpack: {exc}") from exc
    if not isinstance(metadata, dict) or not all(isinstance(key, str) for key in metadata):
        raise InvalidRequest("metadata in a request body is not a map with text as keys")
    return metadata


def _pack_ids(token_ids: tuple[int, ...]) -> bytes:
    """Little-endian uint32; a tenth of the time that msgpack takes for a list."""
    try:
        ids = array("I", token_ids)
    except (OverflowError, TypeError) as exc:
        raise InvalidRequest(
            f"a token id is not an integer between 0 and {MAX_TOKEN_ID}: {exc}", param="prompt"
        ) from exc
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def _unpack_ids(raw: dict[str, Any], name: str) -> tuple[int, ...]:
    packed = raw.get(name)
    if not isinstance(packed, bytes) or len(packed) % 4:
        raise InvalidRequest(f"{name} in a request body is not a row of 4-byte token ids")
    ids = array("I")
    ids.frombytes(packed)
    if sys.byteorder == "big":
        ids.byteswap()
    return tuple(ids)
