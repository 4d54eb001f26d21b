"""One connection to Redis as an asyncio protocol: pipelines out, replies in, in order.

A pipeline costs one write and one future, however many commands are in it: of all that a scheduler's process does,
talking to Redis is the most.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

from splitwise_sched.resp import NOT_YET, ProtocolError, is_push, new_reader


class WireLost(ConnectionError):
    """The connection broke, or nothing came for too long; what was sent may or may not have been done."""


class _Pipeline:
    __slots__ = ("binary", "future", "replies", "silence_s", "size")

    def __init__(self, binary: Sequence[bool], future: asyncio.Future[list[Any]], silence_s: float) -> None:
        self.binary = binary
        self.silence_s = silence_s
        self.size = len(binary)
        self.future = future
        self.replies: list[Any] = []


class Wire(asyncio.Protocol):
    """Takes over a connection that is open already. ``close`` it; ``lost`` says why it is of no use any more."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._reader = new_reader()
        self._due: deque[_Pipeline] = deque()
        self._heard_at = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self.lost: WireLost | None = None
        transport.set_protocol(self)

    def send(self, packed: bytes, binary: Sequence[bool], silence_s: float) -> asyncio.Future[list[Any]]:
        """Send a pipeline.

        Args:
            binary: [num_commands] whether a command's reply holds bytes that are no text.
            silence_s: nothing may come for so long, once its replies are due, before the connection counts as broken.
        Returns:
            A future of the replies, a ReplyError where a command failed. It raises WireLost.
        """
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        if self.lost is not None:
            future.set_exception(self.lost)
            return future
        if not self._due:
            self._heard_at = self._loop.time()
            if self._watch is None:
                self._watch = self._loop.call_later(silence_s, self._look)
        self._due.append(_Pipeline(binary, future, silence_s))
        self._transport.write(packed)
        return future

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        try:
            self._reader.feed(data)
            self._take_replies()
        except (ProtocolError, UnicodeDecodeError) as exc:
            self._lose(f"what came from it is not Redis protocol: {exc}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose(str(exc or "it closed the connection"))

    def close(self) -> None:
        """Idempotent; what is due fails with WireLost."""
        self._lose("the connection was closed here")

    def _take_replies(self) -> None:
        gets = self._reader.gets
        while self._due:
            pipeline = self._due[0]
            replies, binary = pipeline.replies, pipeline.binary
            while len(replies) < pipeline.size:
                reply = gets(not binary[len(replies)])
                if reply is NOT_YET:
                    return
                if not is_push(reply):
                    replies.append(reply)
            self._due.popleft()
            if not pipeline.future.done():
                pipeline.future.set_result(replies)

    def _look(self) -> None:
        """Has what is due been silent for too long?"""
        self._watch = None
        if not self._due:
            return
        silence_s = self._due[0].silence_s
        left_s = self._heard_at + silence_s - self._loop.time()
        if left_s <= 0:
            self._lose(f"no reply came for {silence_s:g} s")
        else:
            self._watch = self._loop.call_later(left_s, self._look)

    def _lose(self, why: str) -> None:
        if self.lost is not None:
            return
        self.lost = WireLost(why)
        if self._watch is not None:
            self._watch.cancel()
        self._transport.abort()
        while self._due:
            future = self._due.popleft().future
            if not future.done():
                future.set_exception(cast(Exception, self.lost))
