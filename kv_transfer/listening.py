"""A listening socket on the messenger's loop."""

from __future__ import annotations

import socket
from abc import abstractmethod

from kv_transfer.reactor import READ, Channel


class ListeningChannel(Channel):
    """Takes in one connection at a time."""

    def __init__(self, sock: socket.socket) -> None:
        """``sock`` does not block; it is closed with the channel."""
        self._sock = sock
        self._is_paused = False

    @abstractmethod
    def take_in(self, sock: socket.socket) -> None:
        """Somebody has connected; the socket is yours."""

    def fileno(self) -> int:
        return self._sock.fileno()

    def interest(self) -> int:
        return 0 if self._is_paused else READ

    def ready(self, mask: int) -> None:
        try:
            sock, _ = self._sock.accept()
        except BlockingIOError:
            return
        except OSError:
            # The peer has hung up again, or this process is out of descriptors: trying at once would spin.
            self._is_paused = True
            return
        self.take_in(sock)

    def tick(self, now: float) -> None:
        self._is_paused = False

    def close(self) -> None:
        self._sock.close()
