"""Asks a server on this machine who it is. Speaks just enough of Redis's protocol for that one question."""

from __future__ import annotations

import socket
from dataclasses import dataclass

MAX_REPLY_BYTES = 1 << 20


class ProbeFailed(Exception):
    """The server does not answer, or not as one that is ready."""


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """What a server says of itself.

    Attributes:
        name: "redis" or "valkey".
        pid: the server's process id.
    """

    name: str
    version: str
    pid: int


def identify(host: str, port: int, *, password: str | None, timeout_s: float) -> ServerIdentity:
    """Who listens on ``host:port``.

    Raises:
        ProbeFailed: nobody, not a Redis, the wrong password, or one that still loads its data.
    """
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as connection:
            connection.settimeout(timeout_s)
            with connection.makefile("rb") as replies:
                if password is not None:
                    connection.sendall(_command(b"AUTH", password.encode()))
                    _line(replies.readline(MAX_REPLY_BYTES))
                # PING answers while the server still loads its data (with an error), INFO would answer as if ready.
                connection.sendall(_command(b"PING") + _command(b"INFO", b"server"))
                _line(replies.readline(MAX_REPLY_BYTES))
                num_bytes = int(_line(replies.readline(MAX_REPLY_BYTES))[1:])
                if not 0 <= num_bytes <= MAX_REPLY_BYTES:
                    raise ProbeFailed(f"its INFO has {num_bytes} bytes")
                text = replies.read(num_bytes).decode(errors="replace")
    except (OSError, ValueError) as exc:
        raise ProbeFailed(str(exc)) from exc
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    try:
        pid = int(fields["process_id"])
    except (KeyError, ValueError) as exc:
        raise ProbeFailed("its INFO names no process_id") from exc
    if "valkey_version" in fields:
        return ServerIdentity("valkey", fields["valkey_version"], pid)
    return ServerIdentity("redis", fields.get("redis_version", "unknown"), pid)


def _command(*parts: bytes) -> bytes:
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)


def _line(line: bytes) -> bytes:
    """One line of a reply, without its end; an error reply, or none at all, is raised."""
    if not line.endswith(b"\r\n"):
        raise ProbeFailed("it closed the connection")
    if line.startswith(b"-"):
        raise ProbeFailed(line[1:].decode(errors="replace").strip())
    return line[:-2]
