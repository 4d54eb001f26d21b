"""A list of buffers that is sent or received over several system calls."""

from __future__ import annotations

import socket
from collections.abc import Sequence

# Buffers in one system call; the kernel's limit is 1024.
MAX_IOVECS = 512


class Buffers:
    """What is left of a list of buffers."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        """``views`` are of bytes, none of them empty."""
        self._views = list(views)
        self._next = 0

    def send(self, sock: socket.socket) -> int:
        """Send some; the number of bytes. Raises BlockingIOError when the socket is full."""
        window = self._window()
        sent = sock.send(window[0]) if len(window) == 1 else sock.sendmsg(window)
        self._advance(sent)
        return sent

    def receive(self, sock: socket.socket) -> int:
        """Fill some; the number of bytes, 0 at the stream's end. Raises BlockingIOError when there are none."""
        window = self._window()
        received = sock.recv_into(window[0]) if len(window) == 1 else sock.recvmsg_into(window)[0]
        self._advance(received)
        return received

    def _window(self) -> list[memoryview]:
        return self._views[self._next : self._next + MAX_IOVECS]

    def _advance(self, num_bytes: int) -> None:
        left = num_bytes
        while left:
            view = self._views[self._next]
            if len(view) > left:
                self._views[self._next] = view[left:]
                return
            left -= len(view)
            self._next += 1
