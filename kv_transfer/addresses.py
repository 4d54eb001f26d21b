"""Sockets on their way to a peer, without waiting for a name server in the messenger's thread."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable

Address = tuple[socket.AddressFamily, tuple[object, ...]]


def resolve(
    host: str, port: int, found: Callable[[Address | OSError], None], post: Callable[[Callable[[], None]], None]
) -> None:
    """Look up ``host``; ``found`` is called with its address, or with why there is none.

    An address in digits is found at once, before this returns; a name in a thread of its own.

    Args:
        post: takes a call from any thread, to be made where ``found`` may run.
    """
    try:
        found(_look_up(host, port, socket.AI_NUMERICHOST))
        return
    except socket.gaierror:
        pass

    def look_up() -> None:
        try:
            answer: Address | OSError = _look_up(host, port, 0)
        except OSError as exc:
            answer = exc
        post(lambda: found(answer))

    threading.Thread(target=look_up, name="kv-resolve", daemon=True).start()


def start_connecting(address: Address) -> socket.socket:
    """A socket that turns writable when it is there, or has failed.

    Raises:
        OSError: it cannot even begin.
    """
    family, sockaddr = address
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        error = sock.connect_ex(sockaddr)
        if error not in (0, errno.EINPROGRESS):
            raise OSError(error, os.strerror(error))
    except OSError:
        sock.close()
        raise
    return sock


def is_connected(sock: socket.socket) -> bool:
    """Whether a socket that is on its way has arrived. Raises OSError when it never will."""
    error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def listen(host: str, port: int) -> socket.socket:
    """Raises OSError: the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.create_server((host, port), family=family, backlog=256)
    sock.setblocking(False)
    return sock


def _look_up(host: str, port: int, flags: int) -> Address:
    family, _, _, _, sockaddr = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)[0]
    return family, sockaddr
