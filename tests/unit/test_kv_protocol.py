"""The messages on the wire: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

from dataclasses import fields, replace

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer import protocol
from kv_transfer.errors import ProtocolError
from kv_transfer.handshake import examine, greet, is_proof, proof
from kv_transfer.protocol import (
    MAX_AUX_BYTES,
    MAX_MESSAGE_BYTES,
    Abort,
    Applied,
    Blocks,
    Confirmed,
    Drained,
    End,
    Hello,
    Message,
    OtherVersion,
    Ping,
    Pong,
    Prove,
    Ready,
    Refused,
    Reserve,
    Welcome,
    decode,
    encode,
)
from tests.unit.test_kv_endpoint import ENDPOINT

TOKEN, DIGEST = bytes(range(16)), bytes(range(32))
MESSAGES: list[Message] = [
    greet(ENDPOINT, ENDPOINT),
    Welcome(DIGEST, DIGEST),
    Prove(DIGEST),
    Ready(TOKEN),
    Refused("version", "why"),
    Reserve(TOKEN, "r@1", 7, "shm", 1000, "xxh3"),
    Blocks(TOKEN, 3, bytes(8), bytes(16)),
    End(TOKEN, b"aux"),
    Applied(TOKEN, 2**40),
    Confirmed(TOKEN),
    Abort(TOKEN, "why"),
    Drained(TOKEN),
    Ping(),
    Pong(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_every_message_survives_the_wire(message: Message) -> None:
    assert decode(encode(message)) == message


def test_every_kind_of_message_is_tried_above() -> None:
    assert {type(m) for m in MESSAGES} == set(protocol._KINDS.values())


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_no_field_takes_a_value_of_another_type(message: Message) -> None:
    parts = msgpack.unpackb(encode(message))
    for position in range(1, len(parts)):
        for wrong in (None, -1, 1.5, True, [1], "x" * 5000, "\x1b[2J"):
            damaged = [*parts[:position], wrong, *parts[position + 1 :]]
            with pytest.raises(ProtocolError):
                decode(msgpack.packb(damaged))
    for other_length in (parts[:-1], [*parts, 0]):
        if len(other_length) > 0:
            with pytest.raises(ProtocolError):
                decode(msgpack.packb(other_length))


def test_the_largest_aux_fits_and_one_more_byte_does_not() -> None:
    largest = End(TOKEN, bytes(MAX_AUX_BYTES))
    assert len(encode(largest)) <= MAX_MESSAGE_BYTES
    assert decode(encode(largest)) == largest
    with pytest.raises(ProtocolError):
        decode(encode(End(TOKEN, bytes(MAX_AUX_BYTES + 1))))


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_never_more_than_a_protocol_error(frame: bytes) -> None:
    try:
        decode(frame)
    except ProtocolError:
        pass


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.integers(0, 15), st.lists(plain, max_size=9))
def test_wellformed_nonsense_is_never_more_than_a_protocol_error(kind: int, values: list[object]) -> None:
    try:
        message = decode(msgpack.packb([kind, *values]))
    except ProtocolError:
        return
    assert len(fields(message)) == len(values)


def test_deep_nesting_and_huge_frames_are_protocol_errors() -> None:
    for frame in (b"\x91" * 100_000 + b"\x01", bytes(MAX_MESSAGE_BYTES + 1), b"\xdd\xff\xff\xff\xff"):
        with pytest.raises(ProtocolError):
            decode(frame)


def test_a_hello_of_another_version_says_which_whatever_else_it_holds() -> None:
    with pytest.raises(OtherVersion) as caught:
        decode(msgpack.packb([1, 7, "a field of the future"]))
    assert caught.value.version == 7


def hello() -> Hello:
    return greet(ENDPOINT, ENDPOINT)


def test_a_proof_holds_for_its_side_secret_and_greeting_only() -> None:
    said, challenge = hello(), DIGEST
    good = proof("secret", "source", said, challenge)
    assert is_proof(good, "secret", "source", said, challenge)
    assert not is_proof(good, "secret", "destination", said, challenge)
    assert not is_proof(good, "other", "source", said, challenge)
    assert not is_proof(good, None, "source", said, challenge)
    assert not is_proof(good, "secret", "source", hello(), challenge)
    assert not is_proof(good, "secret", "source", said, bytes(32))


def test_a_source_examines_whom_a_hello_is_for_and_what_layout_it_tells() -> None:
    assert examine(hello(), ENDPOINT) == ENDPOINT.layout
    for damaged, code in (
        (replace(hello(), target="0" * 32), "stranger"),
        (replace(hello(), layout={}), "layout"),
        (replace(hello(), layout={**ENDPOINT.layout.to_dict(), "model": "other"}), "layout"),
    ):
        refused = examine(damaged, ENDPOINT)
        assert isinstance(refused, Refused)
        assert refused.code == code
