"""The source's end: tells destinations that were let in where the pool is, and knows who has it mapped."""

from __future__ import annotations

import os
import socket
import struct
import time

from kv_transfer.leases import LeaseTable
from kv_transfer.listening import ListeningChannel
from kv_transfer.reactor import READ, WRITE, Channel, ConnectionLost, Reactor
from kv_transfer.transports.cuda_ipc.wire import MAGIC, MAX_STRANGERS, PREFACE, PREFACE_TIMEOUT_S

_CREDENTIALS = struct.Struct("3i")


class Listener(ListeningChannel):
    """Takes in destinations of the same user."""

    def __init__(self, sock: socket.socket, reactor: Reactor, leases: LeaseTable, described: tuple[bytes, int]) -> None:
        """
        Args:
            described: the pool's description, and the descriptor of its order page.
        """
        super().__init__(sock)
        self.leases = leases
        self.description, self.page_fd = described
        self.served: set[ServingChannel] = set()
        self._reactor, self._uid = reactor, os.getuid()

    def take_in(self, sock: socket.socket) -> None:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(credentials)
        if uid != self._uid or sum(channel.session is None for channel in self.served) >= MAX_STRANGERS:
            sock.close()
            return
        sock.setblocking(False)
        channel = ServingChannel(sock, self)
        self.served.add(channel)
        self._reactor.add(channel)

    def hang_up(self, session: bytes) -> None:
        """The channel is kept until its destination has unmapped, or is gone."""
        for channel in self.served:
            if channel.session == session:
                channel.ask_to_unmap()

    def release_all(self, timeout_s: float) -> bool:
        """Ask everybody to unmap, and wait for it; whether all have, or are gone."""
        for channel in list(self.served):
            channel.ask_to_unmap()
        until = time.monotonic() + timeout_s
        done = [channel.wait_unmapped(until) for channel in list(self.served)]
        for channel in list(self.served):
            self._reactor.drop(channel, "the transport was closed")
        return all(done)


class ServingChannel(Channel):
    """One destination.

    Attributes:
        session: the data token that it presented; None while it is a stranger.
    """

    def __init__(self, sock: socket.socket, listener: Listener) -> None:
        self.session: bytes | None = None
        self._sock, self._listener = sock, listener
        self._received = b""
        self._unsent = memoryview(b"")
        self._is_fd_sent = False
        self._preface_until = time.monotonic() + PREFACE_TIMEOUT_S

    def fileno(self) -> int:
        return self._sock.fileno()

    def interest(self) -> int:
        return READ | (WRITE if self._unsent else 0)

    def ready(self, mask: int) -> None:
        if mask & ~WRITE:
            self._read()
        if self._unsent:
            self._write()

    def tick(self, now: float) -> None:
        if self.session is None and now > self._preface_until:
            raise ConnectionLost("no preface in time")

    def close(self) -> None:
        self._sock.close()

    def lost(self, reason: str) -> None:
        self._listener.served.discard(self)

    def ask_to_unmap(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            # It has gone already.
            pass

    def wait_unmapped(self, until: float) -> bool:
        """Whether it hangs up in time; at once for one that was told nothing."""
        if not self._is_fd_sent:
            return True
        try:
            while (left := until - time.monotonic()) > 0:
                self._sock.settimeout(left)
                if not self._sock.recv(1024):
                    return True
        except TimeoutError:
            return False
        except OSError:
            return True
        return False

    def _read(self) -> None:
        try:
            data = self._sock.recv(4096)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionLost("it has hung up")
        self._received += data
        if self.session is not None or len(self._received) > PREFACE.size:
            raise ConnectionLost("it says more than it should")
        if len(self._received) < PREFACE.size:
            return
        magic, session = PREFACE.unpack(self._received)
        if magic != MAGIC or not self._listener.leases.knows(session):
            raise ConnectionLost("a data token that was not given out")
        self.session = session
        self._unsent = memoryview(self._listener.description)

    def _write(self) -> None:
        try:
            if not self._is_fd_sent:
                sent = socket.send_fds(self._sock, [self._unsent], [self._listener.page_fd])
                self._is_fd_sent = True
            else:
                sent = self._sock.send(self._unsent)
        except BlockingIOError:
            return
        self._unsent = self._unsent[sent:]
