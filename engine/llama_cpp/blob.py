"""A sequence's KV as one sealed blob: which input and model it is of, how long it is, and its checksum. Pure."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

ByteArray = npt.NDArray[np.uint8]

MAGIC = b"LLKV\x00\x00\x00\x01"
DIGEST_BYTES = 16
_HEADER = struct.Struct(f"<8sI{DIGEST_BYTES}sQI")
HEADER_BYTES = _HEADER.size


class Unsealed(ValueError):
    """These bytes are not what was sealed, or not for this input; the message says which."""


def digest_of(model: str, token_ids: Sequence[int]) -> bytes:
    """Names the KV of an input under a model."""
    digest = hashlib.blake2b(model.encode(), digest_size=DIGEST_BYTES)
    digest.update(np.asarray(token_ids, dtype="<i4").tobytes())
    return digest.digest()


def seal(state: ByteArray, digest: bytes, num_tokens: int) -> bytes:
    """The header that goes before ``state``."""
    return _HEADER.pack(MAGIC, num_tokens, digest, state.nbytes, _checksum(state, digest))


def unseal(data: ByteArray, digest: bytes, num_tokens: int) -> ByteArray:
    """The state in ``data``, which may be longer; no copy.

    Raises:
        Unsealed: truncated, damaged, or the KV of something else.
    """
    if data.nbytes < HEADER_BYTES:
        raise Unsealed(f"{data.nbytes} bytes are less than a header")
    magic, their_tokens, their_digest, num_bytes, checksum = _HEADER.unpack_from(data.data)
    if magic != MAGIC:
        raise Unsealed("it does not begin as sealed KV of this version does")
    if their_tokens != num_tokens or their_digest != digest:
        raise Unsealed(f"it is KV of another input or model ({their_tokens} tokens, {num_tokens} are wanted)")
    if num_bytes > data.nbytes - HEADER_BYTES:
        raise Unsealed(f"it is truncated: {data.nbytes - HEADER_BYTES} of {num_bytes} bytes are here")
    state = data[HEADER_BYTES : HEADER_BYTES + num_bytes]
    if _checksum(state, digest) != checksum:
        raise Unsealed("its checksum does not match: it was damaged on its way")
    return state


def _checksum(state: ByteArray, digest: bytes) -> int:
    return zlib.crc32(state.data, zlib.crc32(digest))
