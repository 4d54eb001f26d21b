"""The Redis protocol's bytes (RESP2 and RESP3), by hiredis where it is installed and by hand where it is not.

https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

hiredis: Any
try:
    hiredis = importlib.import_module("hiredis")
except ImportError:
    hiredis = None

NOT_YET = object()
"""``Reader.gets`` has no whole reply."""
MAX_DEPTH = 32


class ReplyError(Exception):
    """The server's answer to one command is an error; its first word is its code."""

    @property
    def code(self) -> str:
        return str(self).split(" ", 1)[0]


class ProtocolError(Exception):
    """What came is no Redis protocol."""


class Push(list[Any]):
    """An out-of-band message of RESP3: the reply to no command."""


class Reader(Protocol):
    def feed(self, data: bytes, /) -> None: ...

    def gets(self, decode: bool = True, /) -> Any:
        """The next reply, text decoded unless told otherwise; an error reply is a ReplyError; or NOT_YET.

        Raises ProtocolError; the connection is of no use after that.
        """


def new_reader() -> Reader:
    if hiredis is None:
        return PythonReader()
    reader: Reader = hiredis.Reader(
        protocolError=ProtocolError, replyError=ReplyError, encoding="utf-8", errors="replace", notEnoughData=NOT_YET
    )
    return reader


def is_push(reply: Any) -> bool:
    return isinstance(reply, Push) or (hiredis is not None and isinstance(reply, hiredis.PushNotification))


def pack_in_python(args: Sequence[str | bytes | int | float]) -> bytes:
    """One command as bytes. Raises TypeError for other types."""
    pieces = [b"*%d\r\n" % len(args)]
    for arg in args:
        if isinstance(arg, str):
            data = arg.encode()
        elif isinstance(arg, bytes):
            data = arg
        elif isinstance(arg, (int, float)):
            data = repr(arg).encode()
        else:
            raise TypeError(f"a command's argument is {type(arg).__name__}: give str, bytes, int or float")
        pieces.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(pieces)


def pack(args: tuple[str | bytes | int | float, ...]) -> bytes:
    """One command as bytes. Raises TypeError for other types."""
    if hiredis is None:
        return pack_in_python(args)
    packed: bytes = hiredis.pack_command(args)
    return packed


class _Incomplete(Exception):
    pass


class PythonReader:
    """``Reader`` without hiredis; ten times its time."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0
        self._decode = True

    def feed(self, data: bytes, /) -> None:
        self._buffer += data

    def gets(self, decode: bool = True, /) -> Any:
        start, self._decode = self._at, decode
        try:
            reply = self._value(0)
        except _Incomplete:
            self._at = start
            return NOT_YET
        except ValueError as exc:
            raise ProtocolError(f"a reply is not readable: {exc}") from exc
        if self._at > 1 << 16 or self._at == len(self._buffer):
            del self._buffer[: self._at]
            self._at = 0
        return reply

    def _line(self) -> bytes:
        end = self._buffer.find(b"\r\n", self._at)
        if end < 0:
            raise _Incomplete
        line, self._at = bytes(self._buffer[self._at : end]), end + 2
        return line

    def _bulk(self, size: int) -> bytes:
        end = self._at + size
        if len(self._buffer) < end + 2:
            raise _Incomplete
        data, self._at = bytes(self._buffer[self._at : end]), end + 2
        return data

    def _text(self, data: bytes) -> str | bytes:
        return data.decode(errors="replace") if self._decode else data

    def _value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ProtocolError(f"a reply is nested more than {MAX_DEPTH} deep")
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return self._text(rest)
        if kind == b"-":
            return ReplyError(rest.decode(errors="replace"))
        if kind in b":(" and kind:
            return int(rest)
        if kind == b"_":
            return None
        if kind == b"#":
            return rest == b"t"
        if kind == b",":
            return float(rest)
        size = int(rest)
        if size < 0:
            return None
        if kind == b"$":
            return self._text(self._bulk(size))
        if kind == b"!":
            return ReplyError(self._bulk(size).decode(errors="replace"))
        if kind == b"=":
            return self._text(self._bulk(size)[4:])
        if kind in (b"*", b"~"):
            return [self._value(depth + 1) for _ in range(size)]
        if kind == b">":
            return Push(self._value(depth + 1) for _ in range(size))
        if kind == b"%":
            return {self._value(depth + 1): self._value(depth + 1) for _ in range(size)}
        raise ProtocolError(f"a reply begins with {line[:20]!r}")
