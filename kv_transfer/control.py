"""The control channel: who talks to whom, in frames, and the processes that are watched.

Destinations connect to the one listening port; each source is connected to. A frame is its length, four bytes,
little-endian, and as many bytes. What one turn says to a peer goes out as one piece. Everything here runs under the
messenger's lock.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from dataclasses import dataclass
from enum import Enum

from kv_transfer.addresses import Address, is_connected, listen, resolve, start_connecting
from kv_transfer.effects import PeerKey
from kv_transfer.errors import TransportFailed
from kv_transfer.identity import ProcessIdentity, open_pidfd
from kv_transfer.listening import ListeningChannel
from kv_transfer.protocol import MAX_MESSAGE_BYTES
from kv_transfer.reactor import READ, WRITE, Channel, ConnectionLost, Reactor

_LENGTH = struct.Struct("<I")
# What waits for a peer that does not read; one that has let so much pile up is told nothing more.
_MAX_UNSENT_BYTES = 64 << 20
# What one connection may deliver before the others, and the timers, get their turn.
_READ_BYTES = 1 << 18
# Connections that were not let in: how many at a time, and how long each may take.
_MAX_STRANGERS = 1024
_STRANGER_TIMEOUT_S = 5.0
# How long a connection that is being closed may take to deliver its last words.
_LINGER_S = 0.5


class Source(Enum):
    """Where something came from."""

    SESSION = "session"
    PEER = "peer"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Incoming:
    """Something that happened.

    Attributes:
        key: of the session (a destination that talks to us) or the peer (a source that we talk to).
        frame: empty for CLOSED, and for what was no frame.
        reason: for CLOSED, why the connection is of no more use, or that the process at its other end has ended.
    """

    source: Source
    key: PeerKey
    frame: bytes = b""
    reason: str = ""


class ControlChannel:
    """Owns its connections; the reactor is the messenger's."""

    def __init__(self, reactor: Reactor, host: str, port: int) -> None:
        """Begin to listen.

        Raises:
            TransportFailed: the address cannot be had.
        """
        self._reactor = reactor
        self._connections: dict[PeerKey, _Connection] = {}
        self._closing: set[_Connection] = set()
        self._watches: dict[PeerKey, _Watch] = {}
        self._incoming: list[Incoming] = []
        self._num_strangers = 0
        try:
            sock = listen(host, port)
        except OSError as exc:
            raise TransportFailed(f"cannot listen on {host} port {port} for the KV control channel: {exc}") from exc
        self.port = int(sock.getsockname()[1])
        self._listener = _Listener(sock, self)
        reactor.add(self._listener)

    @property
    def has_strangers(self) -> bool:
        """Whether the clock matters."""
        return self._num_strangers > 0 or bool(self._closing)

    def connect(self, host: str, port: int) -> PeerKey:
        """Begin to reach a source; the key is never used for another one."""
        key = secrets.token_bytes(8)
        connection = _Connection(Source.PEER, key, self, f"{host} port {port}")
        self._connections[key] = connection
        resolve(host, port, connection.connect, self._reactor.submit)
        return key

    def tell(self, key: PeerKey, frame: bytes) -> bool:
        """Whether the message is on its way to a peer or a session."""
        connection = self._connections.get(key)
        return connection is not None and connection.tell(frame)

    def let_in(self, key: PeerKey) -> None:
        """A session is no stranger any more."""
        connection = self._connections.get(key)
        if connection is not None and connection.is_stranger:
            connection.is_stranger = False
            self._num_strangers -= 1

    def hang_up(self, key: PeerKey) -> None:
        """Close a connection, after what was told on it; nothing more comes from it. Idempotent."""
        self.unwatch(key)
        connection = self._connections.pop(key, None)
        if connection is None:
            return
        self._forget_stranger(connection)
        if connection.is_open:
            self._closing.add(connection)
        connection.begin_closing()

    def watch(self, key: PeerKey, process: ProcessIdentity) -> None:
        """Report CLOSED when a process ends, if it can be seen from here. Watching twice is a mistake."""
        fd = open_pidfd(process)
        if fd is not None:
            self._watches[key] = watch = _Watch(fd, key, self)
            self._reactor.add(watch)

    def unwatch(self, key: PeerKey) -> None:
        """Idempotent."""
        watch = self._watches.pop(key, None)
        if watch is not None:
            self._reactor.drop(watch, "")

    @property
    def has_incoming(self) -> bool:
        return bool(self._incoming)

    def take(self) -> list[Incoming]:
        """What has happened since the last call, in order."""
        found, self._incoming = self._incoming, []
        return found

    def close(self) -> None:
        """Hang up on everybody, and send what was told, for half a second at most."""
        self._reactor.drop(self._listener, "")
        for key in [*self._connections, *self._watches]:
            self.hang_up(key)
        until = time.monotonic() + _LINGER_S
        while self._closing and time.monotonic() < until:
            self._reactor.dispatch(self._reactor.wait(until - time.monotonic()))
        for connection in list(self._closing):
            self._reactor.drop(connection, "")

    def accept(self, sock: socket.socket) -> None:
        """A destination, or anybody, has connected."""
        if self._num_strangers >= _MAX_STRANGERS:
            sock.close()
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        key = secrets.token_bytes(8)
        connection = _Connection(Source.SESSION, key, self, "a destination")
        self._connections[key] = connection
        self._num_strangers += 1
        connection.open(sock, is_there=True)

    def deliver(self, incoming: Incoming) -> None:
        """For ``take``; not from connections that were hung up on."""
        if incoming.key in self._connections:
            self._incoming.append(incoming)

    def add(self, connection: _Connection) -> None:
        self._reactor.add(connection)

    def flush_later(self, connection: _Connection) -> None:
        self._reactor.flush_later(connection)

    def flush_now(self, connection: _Connection) -> None:
        self._reactor.guard(connection, connection.flush)

    def forget(self, connection: _Connection, reason: str) -> None:
        """A connection is closed, or was never made."""
        self._closing.discard(connection)
        self.deliver(Incoming(Source.CLOSED, connection.key, reason=reason))
        if self._connections.pop(connection.key, None) is not None:
            self._forget_stranger(connection)

    def _forget_stranger(self, connection: _Connection) -> None:
        if connection.is_stranger:
            connection.is_stranger = False
            self._num_strangers -= 1


class _Listener(ListeningChannel):
    def __init__(self, sock: socket.socket, control: ControlChannel) -> None:
        super().__init__(sock)
        self._control = control

    def take_in(self, sock: socket.socket) -> None:
        self._control.accept(sock)


class _Watch(Channel):
    """A pidfd."""

    def __init__(self, fd: int, key: PeerKey, control: ControlChannel) -> None:
        self._fd, self._key, self._control = fd, key, control

    def fileno(self) -> int:
        return self._fd

    def interest(self) -> int:
        return READ

    def ready(self, mask: int) -> None:
        self._control.deliver(Incoming(Source.CLOSED, self._key, reason="its process has ended"))
        self._control.unwatch(self._key)

    def close(self) -> None:
        os.close(self._fd)


class _Connection(Channel):
    """resolving -> connecting -> open -> closing: what was told is sent, what comes is dropped, until the other side
    has closed as well. Closing at once would take back what the other side has not read yet.
    """

    def __init__(self, source: Source, key: PeerKey, control: ControlChannel, name: str) -> None:
        self.key = key
        self.is_stranger = source is Source.SESSION
        self._source, self._control, self._name = source, control, name
        self._sock: socket.socket | None = None
        self._is_there = False
        self._received = bytearray()
        self._unsent = bytearray()
        self._stranger_until = time.monotonic() + _STRANGER_TIMEOUT_S
        self._closing_until: float | None = None
        self._is_shut = False

    @property
    def is_open(self) -> bool:
        return self._sock is not None

    def connect(self, address: Address | OSError) -> None:
        """The peer's address was found, or was not."""
        if self._closing_until is not None:
            return
        try:
            if isinstance(address, OSError):
                raise address
            sock = start_connecting(address)
        except OSError as exc:
            self._control.forget(self, f"cannot connect to {self._name}: {exc}")
            return
        self.open(sock, is_there=False)

    def open(self, sock: socket.socket, *, is_there: bool) -> None:
        sock.setblocking(False)
        self._sock, self._is_there = sock, is_there
        self._control.add(self)

    def tell(self, frame: bytes) -> bool:
        if len(self._unsent) > _MAX_UNSENT_BYTES:
            return False
        self._unsent += _LENGTH.pack(len(frame)) + frame
        if self._is_there:
            self._control.flush_later(self)
        return True

    def begin_closing(self) -> None:
        self._closing_until = time.monotonic() + _LINGER_S
        self._control.flush_now(self)

    def fileno(self) -> int:
        return -1 if self._sock is None else self._sock.fileno()

    def interest(self) -> int:
        if not self._is_there:
            return WRITE
        return READ | (WRITE if self._unsent else 0)

    def ready(self, mask: int) -> None:
        if not self._is_there:
            self._arrive()
        if self._unsent:
            self.flush()
        if self._is_there and mask & ~WRITE:
            self._read()

    def flush(self) -> None:
        if self._sock is None or not self._is_there:
            return
        try:
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            return
        if self._closing_until is not None and not self._is_shut:
            self._is_shut = True
            self._sock.shutdown(socket.SHUT_WR)

    def tick(self, now: float) -> None:
        if self._closing_until is not None and now >= self._closing_until:
            raise ConnectionLost("closed")
        if self.is_stranger and now >= self._stranger_until:
            raise ConnectionLost("it did not prove itself in time")

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()

    def lost(self, reason: str) -> None:
        self._control.forget(self, reason)

    def _arrive(self) -> None:
        assert self._sock is not None
        try:
            self._is_there = is_connected(self._sock)
        except OSError as exc:
            raise ConnectionLost(f"cannot connect to {self._name}: {exc.strerror}") from exc

    def _read(self) -> None:
        assert self._sock is not None
        budget = _READ_BYTES
        while budget > 0:
            try:
                data = self._sock.recv(1 << 16)
            except BlockingIOError:
                return
            if not data:
                raise ConnectionLost("its control connection is closed")
            budget -= len(data)
            if self._closing_until is None:
                self._received += data
                self._split()
            if len(data) < 1 << 16:
                return

    def _split(self) -> None:
        """Deliver the frames that are complete."""
        at = 0
        while len(self._received) >= at + _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._received, at)
            if size > MAX_MESSAGE_BYTES:
                self._control.deliver(Incoming(self._source, self.key))
                raise ConnectionLost(f"a message of {size} bytes")
            end = at + _LENGTH.size + size
            if len(self._received) < end:
                break
            frame = bytes(memoryview(self._received)[at + _LENGTH.size : end])
            self._control.deliver(Incoming(self._source, self.key, frame))
            at = end
        del self._received[:at]
