"""The thread that carries all data connections of one messenger, both ways."""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

_TICK_S = 1.0
_CLOSE_TIMEOUT_S = 5.0


class ConnectionLost(Exception):
    """A data connection is of no more use; says why."""


class Channel(ABC):
    """One socket of the loop. Everything runs in the loop's thread."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock

    @abstractmethod
    def interest(self) -> int:
        """EVENT_READ and EVENT_WRITE, as far as something can be done now."""

    @abstractmethod
    def ready(self, mask: int) -> None:
        """Do what can be done without waiting, in bounded time.

        Raises:
            ConnectionLost, OSError: the loop closes the channel.
        """

    @abstractmethod
    def lost(self, reason: str) -> None:
        """The socket was closed. Called once."""

    def tick(self, now: float) -> None:
        """Called about once a second. Raises ConnectionLost to be closed."""


class TcpLoop:
    """Owns its channels' sockets: what is added is closed by it."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake_fd, selectors.EVENT_READ)
        self._calls: deque[Callable[[], None]] = deque()
        self._channels: dict[Channel, int] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kv-tcp", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], None]) -> bool:
        """Run in the loop's thread, in order; from any thread. False when the loop has ended: it will not be run."""
        with self._lock:
            if self._closing:
                return False
            self._calls.append(call)
            os.eventfd_write(self._wake_fd, 1)
            return True

    def close(self) -> None:
        """Close all channels and end the thread."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            os.eventfd_write(self._wake_fd, 1)
        self._thread.join(_CLOSE_TIMEOUT_S)

    def add(self, channel: Channel) -> None:
        """Take over a channel. In the loop's thread."""
        self._channels[channel] = 0
        self.update(channel)

    def drop(self, channel: Channel, reason: str) -> None:
        """Close a channel. Idempotent. In the loop's thread."""
        mask = self._channels.pop(channel, None)
        if mask is None:
            return
        if mask:
            self._selector.unregister(channel.sock)
        channel.sock.close()
        channel.lost(reason)

    def update(self, channel: Channel) -> None:
        """Look at a channel's interest anew. In the loop's thread."""
        before = self._channels.get(channel)
        if before is None:
            return
        mask = channel.interest()
        if mask == before:
            return
        if not before:
            self._selector.register(channel.sock, mask, channel)
        elif mask:
            self._selector.modify(channel.sock, mask, channel)
        else:
            self._selector.unregister(channel.sock)
        self._channels[channel] = mask

    def _run(self) -> None:
        last_tick = time.monotonic()
        try:
            while not self._closing:
                for key, mask in self._selector.select(_TICK_S):
                    if key.data is None:
                        self._drain_wakes()
                    elif key.data in self._channels:
                        self._guard(key.data, mask)
                while self._calls:
                    self._calls.popleft()()
                now = time.monotonic()
                if now - last_tick >= _TICK_S:
                    last_tick = now
                    for channel in list(self._channels):
                        try:
                            channel.tick(now)
                        except ConnectionLost as exc:
                            self.drop(channel, str(exc))
        finally:
            with self._lock:
                self._closing = True
                os.close(self._wake_fd)
            for channel in list(self._channels):
                self.drop(channel, "the transport was closed")
            self._selector.close()

    def _guard(self, channel: Channel, mask: int) -> None:
        try:
            channel.ready(mask)
        except (ConnectionLost, OSError) as exc:
            self.drop(channel, str(exc))
        else:
            self.update(channel)

    def _drain_wakes(self) -> None:
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            pass
