"""What a messenger does with peers that it should not talk to, and with bytes that nobody should send."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import secrets
import socket
import struct

import msgpack
import pytest

from kv_transfer import RankEndpoint, Received, TransferFailed, TransferOptions
from kv_transfer.handshake import greet, proof
from kv_transfer.protocol import (
    MAX_MESSAGE_BYTES,
    WIRE_VERSION,
    Abort,
    Applied,
    Drained,
    Message,
    Ping,
    Prove,
    Ready,
    Refused,
    Reserve,
    Welcome,
    decode,
    encode,
)
from kv_transfer.transports.tcp_wire import MAGIC, PREFACE, REQUEST
from tests.integration.kv_pairs import Ranks, assert_moves
from tests.integration.kv_rank import LAYOUT, WAIT_S, LocalRank, differing, wait_for

OPTIONS = TransferOptions(protocols=("tcp",), secret="the topic's secret", heartbeat_s=0.2, silence_s=2.0)


def assert_refused(source: LocalRank, destination: LocalRank, *words: str) -> None:
    """A transfer between the two fails at the destination, with these words; the source has nothing to report."""
    destination.receive("refused@1", [source.endpoint], [1])
    failed = destination.wait("refused@1")
    assert isinstance(failed, TransferFailed)
    for word in words:
        assert word in failed.reason


class Caller:
    """Somebody who talks to a control port; ``handshake`` makes him somebody whom the source believes."""

    def __init__(self, target: RankEndpoint, own: RankEndpoint | None = None) -> None:
        self._socket = socket.create_connection(("127.0.0.1", target.control_port), timeout=WAIT_S)
        self._target, self._own = target, own or target

    def say(self, *frames: bytes) -> None:
        self._socket.sendall(b"".join(struct.pack("<I", len(frame)) + frame for frame in frames))

    def tell(self, message: Message) -> None:
        self.say(encode(message))

    def hear(self) -> Message:
        (size,) = struct.unpack("<I", self._read(4))
        return decode(self._read(size))

    def is_hung_up_on(self) -> bool:
        """Whether the other side says nothing more; waits until that is decided."""
        try:
            while self._socket.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        return True

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            assert part, "the connection was closed"
            data += part
        return data

    def handshake(self, secret: str | None) -> Message:
        hello = greet(self._own, self._target)
        self.tell(hello)
        welcome = self.hear()
        assert isinstance(welcome, Welcome)
        self.tell(Prove(proof(secret, "destination", hello, welcome.challenge)))
        return self.hear()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def pair(ranks: Ranks) -> tuple[LocalRank, LocalRank]:
    return ranks.pair(LAYOUT, OPTIONS)


def call(ranks: Ranks, target: LocalRank) -> Caller:
    caller = Caller(target.endpoint)
    ranks.callback(caller.close)
    return caller


def test_garbage_on_the_control_port_is_dropped_and_counted(ranks: Ranks, pair: tuple[LocalRank, LocalRank]) -> None:
    source, destination = pair
    rng = random.Random(0)
    frames = [rng.randbytes(rng.randrange(1, 200)) for _ in range(200)]
    frames += [
        msgpack.packb([kind, *[rng.choice([None, -1, b"x", "y", {}])] * n]) for kind in range(16) for n in range(9)
    ]
    frames += [encode(Ping())[:1], b"", b"\x91" * 4000, msgpack.packb({1: 2}), msgpack.packb([[[[1]]]])]
    for frame in frames:
        caller = Caller(source.endpoint)
        with contextlib.suppress(ConnectionError):
            caller.say(frame, encode(Ping()))
            assert caller.is_hung_up_on()
        caller.close()
    with socket.create_connection(("127.0.0.1", source.endpoint.control_port)) as raw:
        raw.sendall(os.urandom(10_000))
    assert_moves(source, destination, "r@1")
    wait_for(lambda: source.counters()["garbage_total"] >= 100)


def test_a_message_that_is_too_big_costs_its_sender_the_connection_and_nobody_else(
    ranks: Ranks, pair: tuple[LocalRank, LocalRank]
) -> None:
    source, destination = pair
    call(ranks, source).say(bytes(MAX_MESSAGE_BYTES + 1))
    assert_moves(source, destination, "r@1")


def test_garbage_on_the_data_port_is_dropped_and_counted(pair: tuple[LocalRank, LocalRank]) -> None:
    source, destination = pair
    port = int(source.endpoint.transports["tcp"]["port"])
    for data in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), PREFACE.pack(MAGIC, secrets.token_bytes(16)), MAGIC[:3]):
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as raw:
            raw.sendall(data)
            if data != MAGIC[:3]:
                try:
                    assert raw.recv(1) == b"", "a stranger is not answered"
                except ConnectionResetError:
                    pass
    assert_moves(source, destination, "r@1")
    wait_for(lambda: source.counters()["tcp_strangers_total"] >= 4)


def test_who_does_not_know_the_secret_is_refused_on_either_side(
    ranks: Ranks, pair: tuple[LocalRank, LocalRank]
) -> None:
    source, destination = pair
    stranger = ranks.local(LAYOUT, dataclasses.replace(OPTIONS, secret="another"), "stranger", 3)
    nobody = ranks.local(LAYOUT, dataclasses.replace(OPTIONS, secret=None), "nobody", 4)
    for other in (stranger, nobody):
        assert_refused(source, other, "do not share the same transfer secret")
    assert_refused(stranger, destination, "do not share the same transfer secret")
    caller = call(ranks, source)
    answer = caller.handshake("a guess")
    assert isinstance(answer, Refused)
    assert answer.code == "secret"
    with contextlib.suppress(ConnectionError):
        caller.tell(Reserve(bytes(16), "r@1", 40, "tcp", 1000, "none"))
    assert caller.is_hung_up_on()
    assert_moves(source, destination, "r@1")


def test_a_session_can_neither_fetch_nor_end_what_is_anothers(ranks: Ranks, pair: tuple[LocalRank, LocalRank]) -> None:
    source, destination = pair
    source.open_send("r@1", 40)
    source.send_blocks("r@1", 0, range(100, 120))
    destination.receive("r@1", [source.endpoint], range(40))
    token = _token_of(source, "r@1")
    caller = call(ranks, source)
    ready = caller.handshake(OPTIONS.secret)
    assert isinstance(ready, Ready)
    caller.tell(Applied(token, 0))
    assert isinstance(caller.hear(), Abort)
    caller.tell(Abort(token, "mine"))
    assert isinstance(caller.hear(), Drained)
    with socket.create_connection(("127.0.0.1", int(source.endpoint.transports["tcp"]["port"])), timeout=WAIT_S) as raw:
        raw.sendall(PREFACE.pack(MAGIC, ready.data_token))
        raw.sendall(REQUEST.pack(token, 0, 1) + (100).to_bytes(4, "little"))
        assert raw.recv(64) == bytes(4) + (1).to_bytes(4, "little") + bytes(8), "refused, with no bytes"
    source.send_blocks("r@1", 20, range(120, 140))
    source.finish_send("r@1")
    assert isinstance(destination.wait("r@1"), Received)
    assert differing(LAYOUT, destination.view[:40], source.view[100:140]) == []


def test_a_known_peer_that_breaks_the_protocol_loses_its_session_only(
    ranks: Ranks, pair: tuple[LocalRank, LocalRank]
) -> None:
    source, destination = pair
    caller = call(ranks, source)
    assert isinstance(caller.handshake(OPTIONS.secret), Ready)
    caller.tell(Reserve(bytes(16), "r@9", 40, "tcp", 60_000, "none"))
    caller.say(b"\x00nonsense")
    answer = caller.hear()
    assert isinstance(answer, Refused)
    assert answer.code == "protocol"
    assert_moves(source, destination, "r@1")


def test_a_layout_mismatch_names_the_field_and_both_values(ranks: Ranks, pair: tuple[LocalRank, LocalRank]) -> None:
    source, destination = pair
    other = ranks.local(dataclasses.replace(LAYOUT, dtype="bfloat16", head_dim=16), OPTIONS, "decode", 5)
    source.open_send("r@1", 40)
    destination.receive("r@1", [source.endpoint], range(40))
    assert_refused(source, other, "dtype", "'bfloat16' here", "'float32' at the peer")
    source.send_blocks("r@1", 0, range(40))
    source.finish_send("r@1")
    assert isinstance(destination.wait("r@1"), Received), "other transfers are not affected"


def test_a_source_checks_the_layout_that_it_is_told(ranks: Ranks, pair: tuple[LocalRank, LocalRank]) -> None:
    source, destination = pair
    own = dataclasses.replace(destination.endpoint, layout=dataclasses.replace(destination.endpoint.layout, head_dim=2))
    caller = Caller(source.endpoint, own)
    ranks.callback(caller.close)
    caller.tell(greet(own, source.endpoint))
    answer = caller.hear()
    assert isinstance(answer, Refused)
    assert "head_dim is '8' here and '2' at the peer" in answer.reason


def test_another_wire_version_is_named_on_both_sides(ranks: Ranks, pair: tuple[LocalRank, LocalRank]) -> None:
    source, destination = pair
    caller = call(ranks, source)
    caller.tell(dataclasses.replace(greet(destination.endpoint, source.endpoint), version=99))
    answer = caller.hear()
    assert isinstance(answer, Refused)
    assert f"{WIRE_VERSION} here and 99 at the peer" in answer.reason
    later = RankEndpoint.from_dict({**source.endpoint.to_dict(), "wire_version": 99})
    destination.receive("r@1", [later], [1])
    failed = destination.wait("r@1")
    assert isinstance(failed, TransferFailed)
    assert f"{WIRE_VERSION} here and 99 at" in failed.reason


def test_a_record_of_an_earlier_process_at_the_same_address_is_noticed(pair: tuple[LocalRank, LocalRank]) -> None:
    source, destination = pair
    stale = RankEndpoint.from_dict({**source.endpoint.to_dict(), "nonce": secrets.token_hex(16)})
    destination.receive("r@1", [stale], [1])
    failed = destination.wait("r@1")
    assert isinstance(failed, TransferFailed)
    assert stale.nonce in failed.reason
    assert_moves(source, destination, "r@2")


def test_endpoints_that_are_not_all_ranks_of_one_instance_are_refused(pair: tuple[LocalRank, LocalRank]) -> None:
    source, destination = pair
    destination.receive("r@1", [source.endpoint, source.endpoint], [1])
    failed = destination.wait("r@1")
    assert isinstance(failed, TransferFailed)
    assert "2 endpoints do not make up the 1 ranks" in failed.reason


def test_block_counts_that_differ_fail_both_sides_with_both_numbers(pair: tuple[LocalRank, LocalRank]) -> None:
    source, destination = pair
    source.send("r@1", range(10))
    destination.receive("r@1", [source.endpoint], range(9))
    for side in pair:
        failed = side.wait("r@1")
        assert isinstance(failed, TransferFailed)
        assert "10 blocks" in failed.reason
        assert "9" in failed.reason


def _token_of(source: LocalRank, transfer_id: str) -> bytes:
    """The token of a transfer's receiver: the secret that a thief would need, and that is not enough."""

    def tokens() -> list[bytes]:
        by_token = list(source.messenger._source._by_token.items())
        return [token for token, owner in by_token if owner == transfer_id]

    wait_for(lambda: bool(tokens()))
    return tokens()[0]
