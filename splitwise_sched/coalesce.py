"""Commands that are issued close together ride in one pipeline.

The Python client costs ten times what the server does, most of it per round trip; while one pipeline is under way, the
commands that come in the meantime gather for the next one. Order is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

MAX_PIPELINE = 512


class Command:
    """One Redis command.

    Attributes:
        packed: as it goes over the wire.
        script: for EVALSHA the script's name, so that it can be loaded when the server does not know it.
        binary: the reply holds bytes that are no text.
    """

    __slots__ = ("binary", "packed", "script")

    def __init__(self, packed: bytes, script: str | None = None, binary: bool = False) -> None:
        self.packed = packed
        self.script = script
        self.binary = binary


class Coalescer:
    """Sends commands in the order of ``call`` and ``tell``, in pipelines of those that wait.

    Args:
        send: runs a batch; returns one reply a command, where an exception instance is that command's failure.
            When it raises, all commands of the batch fail with that, and so do all that have come meanwhile.
    """

    def __init__(self, send: Callable[[list[Command]], Awaitable[list[Any]]]) -> None:
        self._send = send
        self._waiting: list[Command] = []
        self._sinks: list[asyncio.Future[Any] | Callable[[Any], None] | None] = []
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def call(self, command: Command) -> asyncio.Future[Any]:
        """Must be called from the event loop's thread."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not self._add(command, future):
            future.cancel()
        return future

    def tell(self, command: Command, on_reply: Callable[[Any], None] | None = None) -> None:
        """The same without a future: ``on_reply`` gets the reply or the exception, unless the connection is closed."""
        self._add(command, on_reply)

    def _add(self, command: Command, sink: asyncio.Future[Any] | Callable[[Any], None] | None) -> bool:
        if self._closed:
            return False
        self._waiting.append(command)
        self._sinks.append(sink)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        return True

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:MAX_PIPELINE], self._waiting[MAX_PIPELINE:]
                sinks, self._sinks = self._sinks[:MAX_PIPELINE], self._sinks[MAX_PIPELINE:]
                try:
                    replies = await self._send(batch)
                except asyncio.CancelledError:
                    _cancel(sinks)
                    raise
                except Exception as exc:
                    # All that waits has waited for as long as this was tried; trying it in its turn, one pipeline after
                    # the other, would make an outage of that length many times as long.
                    sinks, self._sinks, self._waiting = sinks + self._sinks, [], []
                    replies = [exc] * len(sinks)
                for sink, reply in zip(sinks, replies, strict=True):
                    if isinstance(sink, asyncio.Future):
                        _resolve(sink, reply)
                    elif sink is not None:
                        _give(sink, reply)
        finally:
            self._task = None

    async def drain(self) -> None:
        """Wait until everything that was issued has its reply."""
        while self._task is not None:
            await asyncio.wait([self._task])

    async def close(self) -> None:
        """Cancel what has not been answered."""
        self._closed = True
        task = self._task
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        _cancel(self._sinks)
        self._waiting.clear()
        self._sinks.clear()


def _resolve(future: asyncio.Future[Any], reply: Any) -> None:
    if future.done():
        return
    if isinstance(reply, Exception):
        future.set_exception(reply)
        # A caller that does not wait for the reply is no reason for a warning at exit.
        future.exception()
    else:
        future.set_result(reply)


def _give(sink: Callable[[Any], None], reply: Any) -> None:
    try:
        sink(reply)
    except Exception as exc:
        # As asyncio does with a callback that fails: the others are called all the same.
        asyncio.get_running_loop().call_exception_handler({"message": "on_reply failed", "exception": exc})


def _cancel(sinks: list[asyncio.Future[Any] | Callable[[Any], None] | None]) -> None:
    for sink in sinks:
        if isinstance(sink, asyncio.Future):
            sink.cancel()
