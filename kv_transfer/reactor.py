"""One epoll for everything that a messenger waits for: control and data connections, peers' processes, wake-ups."""

from __future__ import annotations

import os
import select
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

READ, WRITE = select.EPOLLIN, select.EPOLLOUT
# What epoll reports unasked.
BROKEN = select.EPOLLERR | select.EPOLLHUP


class ConnectionLost(Exception):
    """A connection is of no more use; says why."""


class Channel(ABC):
    """One descriptor of the reactor, which closes it. Every method runs under the messenger's lock."""

    @abstractmethod
    def fileno(self) -> int: ...

    @abstractmethod
    def interest(self) -> int:
        """READ and WRITE, as far as something can be done now."""

    @abstractmethod
    def ready(self, mask: int) -> None:
        """Do what can be done without waiting, in bounded time; also when called for nothing.

        Raises:
            ConnectionLost, OSError: the reactor drops the channel.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the descriptor."""

    def lost(self, reason: str) -> None:
        """The descriptor was closed. Called once."""

    def flush(self) -> None:
        """Send what was put off to the end of the turn; see ``Reactor.flush_later``. Raises like ``ready``."""

    def tick(self, now: float) -> None:
        """Called now and then. Raises ConnectionLost to be dropped."""


class Reactor:
    """Owns its channels. ``wake`` and ``wait`` may run at any time; for everything else the caller holds the lock."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, READ)
        self._channels: dict[int, Channel] = {}
        self._masks: dict[Channel, int] = {}
        self._to_flush: dict[Channel, None] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._wake_lock = threading.Lock()
        self._is_closed = False

    def wake(self) -> None:
        """End a ``wait``; from any thread. After ``close`` it does nothing."""
        with self._wake_lock:
            if not self._is_closed:
                os.eventfd_write(self._wake_fd, 1)

    def submit(self, call: Callable[[], None]) -> None:
        """Have something done in the next turn; from any thread. Not done when the reactor is closed before."""
        self._calls.append(call)
        self.wake()

    def wait(self, timeout_s: float) -> list[tuple[int, int]]:
        """Wait for something to do, ``timeout_s`` at most; for ``dispatch``. From one thread, without the lock."""
        return self._epoll.poll(timeout_s, 256)

    def dispatch(self, found: list[tuple[int, int]]) -> None:
        """Let channels do what ``wait`` has found."""
        for fd, mask in found:
            if fd == self._wake_fd:
                self._drain_wakes()
                continue
            # Since it was found, the channel may have gone, and even another one have taken its descriptor.
            channel = self._channels.get(fd)
            if channel is not None:
                self.guard(channel, lambda c=channel, m=mask: c.ready(m))  # type: ignore[misc]

        while self._calls:
            self._calls.popleft()()

    def guard(self, channel: Channel, act: Callable[[], None]) -> None:
        """Do something with a channel; drop it if that fails, else look at its interest anew."""
        try:
            act()
        except (ConnectionLost, OSError) as exc:
            self.drop(channel, str(exc))
        else:
            self.update(channel)

    def add(self, channel: Channel) -> None:
        """Take over a channel."""
        self._channels[channel.fileno()] = channel
        self._masks[channel] = 0
        self.update(channel)

    def drop(self, channel: Channel, reason: str) -> None:
        """Close a channel. Idempotent."""
        mask = self._masks.pop(channel, None)
        if mask is None:
            return
        self._to_flush.pop(channel, None)
        if mask:
            self._epoll.unregister(channel.fileno())
        del self._channels[channel.fileno()]
        channel.close()
        channel.lost(reason)

    def update(self, channel: Channel) -> None:
        """Look at a channel's interest anew."""
        before = self._masks.get(channel)
        if before is None:
            return
        mask = channel.interest()
        if mask == before:
            return
        if not before:
            self._epoll.register(channel.fileno(), mask)
        elif mask:
            self._epoll.modify(channel.fileno(), mask)
        else:
            self._epoll.unregister(channel.fileno())
        self._masks[channel] = mask

    def flush_later(self, channel: Channel) -> None:
        """Call the channel's ``flush`` at the end of this turn: what is said in one turn goes out in one piece."""
        self._to_flush[channel] = None

    def flush(self) -> None:
        """The turn ends."""
        while self._to_flush:
            channel, _ = self._to_flush.popitem()
            if channel in self._masks:
                self.guard(channel, channel.flush)

    def tick(self, now: float) -> None:
        """Let every channel look at the clock."""
        for channel in list(self._masks):
            self.guard(channel, lambda c=channel: c.tick(now))  # type: ignore[misc]

    def close(self, reason: str) -> None:
        """Drop all channels, and let go of everything."""
        for channel in list(self._masks):
            self.drop(channel, reason)
        with self._wake_lock:
            if not self._is_closed:
                self._is_closed = True
                os.close(self._wake_fd)
                self._epoll.close()

    def _drain_wakes(self) -> None:
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            pass
