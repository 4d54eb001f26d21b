"""KV of consecutive tokens of an input as a sealed piece: which tokens, of which input and model, and a checksum. Pure.

A sequence's KV travels as one or more pieces. Each names what it follows by a digest that goes on from the last one's,
so that a piece which is missing, doubled, out of order or of something else does not open.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ByteArray = npt.NDArray[np.uint8]

MAGIC = b"LLKV\x00\x00\x00\x02"
DIGEST_BYTES = 16
# Magic, first token, number of tokens, digest, bytes of state; then the CRC-32 of this and the state.
_HEADER = struct.Struct(f"<8sII{DIGEST_BYTES}sQ")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size


class Unsealed(ValueError):
    """These bytes are not what was sealed, or not for this input; the message says which."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an input's KV is sealed, or opened.

    Attributes:
        digest: of the model, and of the tokens up to there.
    """

    num_tokens: int
    digest: bytes

    def after(self, token_ids: Sequence[int]) -> Progress:
        digest = hashlib.blake2b(self.digest, digest_size=DIGEST_BYTES)
        digest.update(np.asarray(token_ids, dtype="<i4").tobytes())
        return Progress(self.num_tokens + len(token_ids), digest.digest())


def beginning(model: str) -> Progress:
    """Before the first token."""
    return Progress(0, hashlib.blake2b(model.encode(), digest_size=DIGEST_BYTES).digest())


def seal(state: ByteArray, before: Progress, after: Progress) -> bytes:
    """The header that goes before ``state``, which is of the tokens between the two."""
    num_tokens = after.num_tokens - before.num_tokens
    header = _HEADER.pack(MAGIC, before.num_tokens, num_tokens, after.digest, state.nbytes)
    return header + _CHECKSUM.pack(zlib.crc32(state.data, zlib.crc32(header)))


def unseal(data: ByteArray, before: Progress, token_ids: Sequence[int]) -> tuple[ByteArray, Progress]:
    """The piece at the start of ``data``, which may be longer.

    Args:
        token_ids: the whole input.
    Returns:
        Its state, not copied, and how far the input's KV is open with it.

    Raises:
        Unsealed: truncated, damaged, not what follows, or the KV of something else.
    """
    if data.nbytes < HEADER_BYTES:
        raise Unsealed(f"{data.nbytes} bytes are less than a header")
    magic, start, num_tokens, digest, num_bytes = _HEADER.unpack_from(data.data)
    if magic != MAGIC:
        raise Unsealed("it does not begin as sealed KV of this version does")
    if start != before.num_tokens:
        raise Unsealed(f"KV of tokens from {start} on is where that of tokens from {before.num_tokens} on should be")
    after = before.after(token_ids[start : start + num_tokens])
    if num_tokens == 0 or after.num_tokens != start + num_tokens or after.digest != digest:
        raise Unsealed(f"it is KV of another input or model ({start + num_tokens} tokens or more of {len(token_ids)})")
    if num_bytes > data.nbytes - HEADER_BYTES:
        raise Unsealed(f"it is truncated: {data.nbytes - HEADER_BYTES} of {num_bytes} bytes are here")
    state = data[HEADER_BYTES : HEADER_BYTES + num_bytes]
    (checksum,) = _CHECKSUM.unpack_from(data.data, _HEADER.size)
    if zlib.crc32(state.data, zlib.crc32(data[: _HEADER.size].data)) != checksum:
        raise Unsealed("its checksum does not match: it was damaged on its way")
    return state, after
