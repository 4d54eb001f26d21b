"""The control channel: every zmq socket of a messenger, what wakes its thread, and the processes that it watches.

One ROUTER takes in destinations; a DEALER for each source. All methods but ``wake`` belong to one thread.
"""

from __future__ import annotations

import os
import secrets
import threading
from dataclasses import dataclass
from enum import Enum

import zmq

from kv_transfer.effects import PeerKey
from kv_transfer.errors import TransportFailed
from kv_transfer.identity import ProcessIdentity, open_pidfd
from kv_transfer.protocol import MAX_MESSAGE_BYTES

# Messages that wait for a peer that does not read; one that has let so many pile up is taken for gone.
_HIGH_WATER_MARK = 20_000
# Frames that one socket may deliver before the others, and the timers, get their turn.
_MAX_FRAMES_A_TURN = 256
_LINGER_MS = 500


class Source(Enum):
    """Where something came from."""

    SESSION = "session"
    PEER = "peer"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Incoming:
    """Something that happened.

    Attributes:
        key: of the session (a destination that talks to us), the peer (a source that we talk to), or the watch.
        frame: empty for ENDED: the watched process is no more.
    """

    source: Source
    key: PeerKey
    frame: bytes


class ControlChannel:
    """Owns its sockets and descriptors."""

    def __init__(self, host: str, port: int) -> None:
        """Begin to listen.

        Raises:
            TransportFailed: the address cannot be had.
        """
        self._context = zmq.Context(io_threads=1)
        self._poller = zmq.Poller()
        self._dealers: dict[PeerKey, zmq.Socket[bytes]] = {}
        self._keys: dict[zmq.Socket[bytes], PeerKey] = {}
        self._watches: dict[int, PeerKey] = {}
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock = threading.Lock()
        self._is_closed = False
        self._router = self._socket(zmq.ROUTER)
        # An identity belongs to one connection, so nobody can speak in another's name; and who is gone is told so.
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 0)
        try:
            self._router.bind(_address(host, port or "*"))
            endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        except zmq.ZMQError as exc:
            self.close()
            raise TransportFailed(f"cannot listen on {host} port {port} for the KV control channel: {exc}") from exc
        self.port = int(endpoint.rpartition(":")[2])
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._wake_fd, zmq.POLLIN)

    def wake(self) -> None:
        """End a ``wait``; from any thread. After ``close`` it does nothing."""
        with self._wake_lock:
            if not self._is_closed:
                os.eventfd_write(self._wake_fd, 1)

    def connect(self, host: str, port: int) -> PeerKey:
        """Begin to reach a source; the key is never used for another one.

        Raises:
            TransportFailed: no such address.
        """
        key = secrets.token_bytes(8)
        dealer = self._socket(zmq.DEALER)
        try:
            dealer.connect(_address(host, port))
        except zmq.ZMQError as exc:
            dealer.close(0)
            raise TransportFailed(f"cannot connect to {host} port {port}: {exc}") from exc
        self._dealers[key], self._keys[dealer] = dealer, key
        self._poller.register(dealer, zmq.POLLIN)
        return key

    def disconnect(self, key: PeerKey) -> None:
        """Hang up on a source, after what was told to it. Idempotent."""
        dealer = self._dealers.pop(key, None)
        if dealer is not None:
            del self._keys[dealer]
            self._poller.unregister(dealer)
            dealer.close(_LINGER_MS)

    def tell_peer(self, key: PeerKey, frame: bytes) -> bool:
        """Whether the message is on its way to a source."""
        dealer = self._dealers.get(key)
        return dealer is not None and _send(dealer, [frame])

    def tell_session(self, key: PeerKey, frame: bytes) -> bool:
        """Whether the message is on its way to a destination."""
        return _send(self._router, [key, frame])

    def watch(self, key: PeerKey, process: ProcessIdentity) -> bool:
        """Report ENDED when a process ends; False when it cannot be seen from here. Watching twice is a mistake."""
        fd = open_pidfd(process)
        if fd is None:
            return False
        self._watches[fd] = key
        self._poller.register(fd, zmq.POLLIN)
        return True

    def unwatch(self, key: PeerKey) -> None:
        """Idempotent."""
        for fd in [fd for fd, owner in self._watches.items() if owner == key]:
            self._poller.unregister(fd)
            del self._watches[fd]
            os.close(fd)

    def wait(self, timeout_s: float) -> list[Incoming]:
        """Wait for something to happen, ``timeout_s`` at most; what has happened, bounded.

        All of it is taken in before any is acted upon, as acting may close the very sockets that it came from.
        """
        found: list[Incoming] = []
        for what, _ in self._poller.poll(max(0, int(timeout_s * 1000))):
            if what == self._wake_fd:
                self._drain_wakes()
            elif isinstance(what, int):
                found.append(Incoming(Source.ENDED, self._watches[what], b""))
            elif what is self._router:
                for key, *frames in _receive(what):
                    found.append(Incoming(Source.SESSION, key, frames[0] if len(frames) == 1 else b""))
            else:
                for frames in _receive(what):
                    found.append(Incoming(Source.PEER, self._keys[what], frames[0] if len(frames) == 1 else b""))
        return found

    def close(self) -> None:
        """Send what was told, for half a second at most, and let go of everything."""
        for key in list(self._dealers):
            self.disconnect(key)
        for key in set(self._watches.values()):
            self.unwatch(key)
        self._router.close(_LINGER_MS)
        self._context.term()
        with self._wake_lock:
            self._is_closed = True
            os.close(self._wake_fd)

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.SNDHWM, _HIGH_WATER_MARK)
        socket.setsockopt(zmq.LINGER, _LINGER_MS)
        socket.setsockopt(zmq.IPV6, 1)
        return socket

    def _drain_wakes(self) -> None:
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            pass


def _address(host: str, port: int | str) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _send(socket: zmq.Socket[bytes], frames: list[bytes]) -> bool:
    try:
        socket.send_multipart(frames, zmq.NOBLOCK)
    except zmq.ZMQError:
        # No such peer any more, or one that does not read.
        return False
    return True


def _receive(socket: zmq.Socket[bytes]) -> list[list[bytes]]:
    messages: list[list[bytes]] = []
    while len(messages) < _MAX_FRAMES_A_TURN:
        try:
            messages.append(socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            break
    return messages
